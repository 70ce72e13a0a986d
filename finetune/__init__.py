"""A checkpoint → a task: head swap, higher resolution, looking inside."""
