"""Plain data and pure functions that driver, task and worker share. Runs in: every process."""
