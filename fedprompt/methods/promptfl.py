"""PromptFL: CoOp's unified context, learned by all clients and averaged.

Sources: PromptFL: Let Federated Participants Cooperatively Learn Prompts Instead of Models (Guo et
al., IEEE TMC 2023, arXiv 2208.11625); the prompt is CoOp's (Learning to Prompt for Vision-Language
Models, Zhou et al., IJCV 2022, arXiv 2109.01134): `[SOS][v_1 .. v_M][class].`, cosine logits times
exp(logit_scale), cross-entropy. Checked against CoOp's `trainers/coop.py` and PromptFL's
`trainers/promptfl.py`.

How we differ: the public PromptFL code stores references to one model's weights instead of copies,
so it averages the prompt of the last client only; it never clears that list between rounds, and it
would weight all clients equally. We average the replies of a round, weighted by their numbers of
images (`strategy.weights=uniform` weights them equally). One optimiser serves all clients and
rounds there, so that momentum passes from client to client; ours starts at zero in each round.
CoOp's code trains its first epoch at the rate 1e-5 and leaves out the last partial batch of an
epoch; ours does neither (docs/concepts.md, "Local training").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedprompt.backbone.clip import FrozenCLIP
from fedprompt.config.fields import option
from fedprompt.data.features.inputs import Inputs
from fedprompt.methods.base import Method, Task, Tensors
from fedprompt.methods.parts.losses import cosine_logits
from fedprompt.methods.parts.prompts import PromptConfig, PromptSource


@dataclass(frozen=True)
class PromptFLConfig(PromptConfig):
    """Defaults: CoOp's and PromptFL's 16 context tokens, N(0, 0.02^2)."""

    supports_image_noise = True
    token_space = True

    class_position: Literal["end", "middle", "front"] = option("end", "where the class name stands")


class PromptFL(Method):
    """One shared context; nothing private."""

    name = "promptfl"
    source = "Guo et al., IEEE TMC 2023"
    Config = PromptFLConfig
    multi_label = True

    def __init__(self, config: PromptFLConfig, clip: FrozenCLIP, task: Task) -> None:
        super().__init__(config, clip, task)
        # The tower belongs to this class list: token ids and end-of-text positions follow its names
        # and are never part of a container, so they cannot be averaged.
        self.prompts = PromptSource.of(config, clip, task, position=config.class_position)

    def init_shared(self, seed: int) -> Tensors:
        """`ctx` (M, d)."""
        return {"ctx": self.prompts.start(seed, "init", "shared")}

    def encode(self, shared: Tensors, private: Tensors | None) -> Tensors:
        """Class features (K, C, D) of the contexts (K, M, d)."""
        return {"classes": self.prompts.classes(shared["ctx"])}

    def logits(self, encoded: Tensors, inputs: Inputs) -> Tensor:
        """Cosine logits (K, B, C)."""
        return cosine_logits(self.clip, inputs.features, encoded["classes"])
