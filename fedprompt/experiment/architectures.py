"""Whether a method and a backbone fit, as far as the backbone's architecture tells.

What this refuses would be refused when the method is created as well, but only after its weights
have been downloaded.
"""

from __future__ import annotations

import importlib.util

import open_clip

from fedprompt.backbone.zoo import support_of
from fedprompt.config.schema import Config
from fedprompt.errors import UserError
from fedprompt.methods.method_config import allows_other_image_towers
from fedprompt.methods.registry import method_class


def refuse_architecture(config: Config) -> None:
    """Refuse a method that needs what the image tower does not have.

    Models in folders and on the hub are not looked at here.

    Args:
        config: the experiment.

    Raises:
        UserError: the method does not allow clients other image towers, puts prompts into an image
            tower without a place for them, or reads features of patches that the tower does not
            give.
    """
    method, model = config.method.name, config.backbone.model
    if config.backbone.client_models and not allows_other_image_towers(config.method):
        raise UserError(
            "backbone.client_models gives the clients other image towers, and method "
            f"'{method}' does not allow it: what it shares or learns depends on the image tower. "
            "Methods such as promptfl share prompts of the text tower only."
        )
    needs = method_class(method).needs_of(config.method)
    if not needs & {"pixels", "patches", "local"} or model not in open_clip.list_models():
        return
    model_cfg = open_clip.get_model_config(model)
    if "timm_model_name" in model_cfg["vision_cfg"] and not importlib.util.find_spec("timm"):
        return
    support = support_of(model_cfg)
    if "pixels" in needs and support.visual == "no":
        raise UserError(
            f"backbone: method '{method}' changes the inputs of the image tower's layers, which "
            f"that of {model} has no place for; choose a model with a vision transformer "
            "(docs/backbones.md lists what each architecture can do)."
        )
    if needs & {"patches", "local"} and not support.patches:
        raise UserError(
            f"backbone: method '{method}' reads features of patches, which {model} does not give; "
            "choose another model (docs/backbones.md lists what each architecture can do)."
        )
