"""What is asked of Spark on the driver."""
