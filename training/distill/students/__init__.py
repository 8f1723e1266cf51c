"""What distillation learns."""
