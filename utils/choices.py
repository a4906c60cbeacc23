"""Values that options and settings choose from; without libraries, so that --help is quick."""

PRECISIONS = ("off", "bf16", "fp16", "auto")  # of trainings: the setting `amp`
# Of evaluation and prediction. Thresholds hold for one of them, so none depends on the device.
FP32, BF16, FP16 = FORWARD_PRECISIONS = ("fp32", "bf16", "fp16")
STARTS = ("zero", "identity", "subspace")  # what the reconstruction begins as
# What anomaly maps are made of.
DISCRIMINATOR, RESIDUAL, BOTH, RESIDUAL_AND_NOVELTY = SCORES = (
    "discriminator",
    "residual",
    "both",
    "residual+novelty",
)
PADDINGS = ("zeros", "replicate")  # what convolutions see beyond the border
NORMAL, EDIT = "normal", "edit"  # anomaly types that synthesize.py does not blend
MVTEC, COCO, YOLO = PAIR_FORMATS = ("mvtec", "coco", "yolo")  # of synthesize.py
PNG, JPEG, NO_PICTURES = FORMATS = ("png", "jpg", "none")  # of heat maps
HELD_OUT_RULE, BEST_RULE = RULES = ("held-out", "best-f1")  # what an evaluation chooses thresholds by
