"""`lightning-sage compare`: one configuration by several methods, side by side."""
