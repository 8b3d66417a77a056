"""What follows a fit: meters, loggers, history, looks at the gradient, memory budget."""
