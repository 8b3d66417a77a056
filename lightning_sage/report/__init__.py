"""`lightning-sage report`: a fit's history as one HTML page."""
