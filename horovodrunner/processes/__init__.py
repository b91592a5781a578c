"""Who starts whom: the driver, the tasks, the workers."""
