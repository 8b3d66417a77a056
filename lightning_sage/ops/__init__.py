"""The door to the ops."""
