"""The related papers' methods, a file each; METHODS names those that `analyses/compare_methods.py` compares."""

from rsteer_interp.methods.ace import ACE
from rsteer_interp.methods.alphasteer import AlphaSteer
from rsteer_interp.methods.arditi import Arditi, ArditiAddition
from rsteer_interp.methods.base import Examples, Material, Method, Treatment
from rsteer_interp.methods.cast import Cast
from rsteer_interp.methods.compliance_vector import Bind, Compliance
from rsteer_interp.methods.cosmic import Cosmic, CosmicAffine
from rsteer_interp.methods.dbdi import Dbdi
from rsteer_interp.methods.format_vector import AnswerForm
from rsteer_interp.methods.prompt_tuning import PromptTuning
from rsteer_interp.methods.prompting import PromptNeutral, PromptOpen, PromptSafe
from rsteer_interp.methods.random_direction import RandomDirections
from rsteer_interp.methods.rdo import RDO, RDORetain
from rsteer_interp.methods.refusal_steering import (
    MeanDifferenceReposition,
    MeanDifferenceSteering,
    WeightedRidgeReposition,
    WeightedRidgeSteering,
)
from rsteer_interp.methods.scans import Scans
from rsteer_interp.methods.selective import Selective

METHODS: dict[str, type[Method]] = {
    "random": RandomDirections,
    "prompt_neutral": PromptNeutral,
    "prompt_open": PromptOpen,
    "prompt_safe": PromptSafe,
    "prompt_tuned": PromptTuning,
    "md": MeanDifferenceSteering,
    "md_reposition": MeanDifferenceReposition,
    "wrmd": WeightedRidgeSteering,
    "wrmd_reposition": WeightedRidgeReposition,
    "selective": Selective,
    "arditi": Arditi,
    "arditi_add": ArditiAddition,
    "cosmic": Cosmic,
    "cosmic_affine": CosmicAffine,
    "ace": ACE,
    "dbdi": Dbdi,
    "scans": Scans,
    "cast": Cast,
    "alphasteer": AlphaSteer,
    "rdo": RDO,
    "rdo_retain": RDORetain,
    "compliance": Compliance,
    "bind": Bind,
    "steer_json": AnswerForm,
}

__all__ = ["METHODS", "Examples", "Material", "Method", "Treatment"]
