"""Saliency-guided sparse backward passes for fine-tuning transformers with Lightning."""

from lightning_sage.callback import SageCallback as SageCallback
from lightning_sage.errors import ReplayError as ReplayError
from lightning_sage.install import Installation as Installation
from lightning_sage.install import install as install
from lightning_sage.install import uninstall as uninstall
from lightning_sage.metrics import CachedBytes as CachedBytes
from lightning_sage.metrics import GradientFidelity as GradientFidelity
from lightning_sage.metrics import KeptTokens as KeptTokens
from lightning_sage.metrics import PeakMemory as PeakMemory
from lightning_sage.metrics import ReplayedTokens as ReplayedTokens
from lightning_sage.metrics import SavedBytes as SavedBytes
from lightning_sage.policy import SagePolicy as SagePolicy
from lightning_sage.records import BlockRecord as BlockRecord
from lightning_sage.sampling import ImportanceSampling as ImportanceSampling
from lightning_sage.sampling import LossFirst as LossFirst
from lightning_sage.sampling import RandomTokens as RandomTokens
from lightning_sage.selections import AllTokens as AllTokens
from lightning_sage.selections import GradientMass as GradientMass
from lightning_sage.selections import Selection as Selection
from lightning_sage.selections import TopFraction as TopFraction
from lightning_sage.selections import TopMass as TopMass
from lightning_sage.strategies import SageModelParallelStrategy as SageModelParallelStrategy
from lightning_sage.strategies import SageStrategy as SageStrategy
