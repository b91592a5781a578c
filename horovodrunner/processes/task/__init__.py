"""One barrier task: gather, spawn, supervise, forward. Runs in: the task (np < 0: the driver)."""
