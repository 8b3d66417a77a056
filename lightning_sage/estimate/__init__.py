"""`lightning-sage estimate`: what a step will hold, before anything is loaded."""

from lightning_sage.estimate.prediction import Estimate as Estimate
from lightning_sage.estimate.prediction import estimate as estimate
