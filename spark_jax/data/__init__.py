"""Records, task formats, and tasks."""
