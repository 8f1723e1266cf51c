"""Flow-matching pipelines that hand one velocity to scheduler.step: an adapter, and a module a class."""
