"""When each micro-batch runs: the table, the schedules that fill it, and the executor."""
