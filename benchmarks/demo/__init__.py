"""The demonstration in four parts that ./launch.sh demo runs."""
