"""Miniatures of models with a text tower of Hugging Face, in the layout of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    M2M100Config,
    MT5Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from fedprompt.backbone.clip import FrozenCLIP
from tests.support.builders import CLASS_NAMES, RANDOM_CLIP

CONTEXT_LENGTH = 256
WORDS = sorted(
    {word for name in CLASS_NAMES for word in name.split()}
    | {"a", "photo", "of", "seen", "from", "above", "here", "an", "overhead", ".", ","}
    | {chr(c) for c in range(ord("a"), ord("z") + 1)}
)
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 260,
}
_SEQUENCE = {"d_model": 32, "vocab_size": 200}
CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**_ENCODER, vocab_size=200),
    "roberta": RobertaConfig(**_ENCODER, vocab_size=200, pad_token_id=1),
    "xlm-roberta": XLMRobertaConfig(**_ENCODER, vocab_size=200, pad_token_id=1),
    "mt5": MT5Config(**_SEQUENCE, num_layers=3, num_heads=4, d_kv=8, d_ff=48),
    "m2m_100": M2M100Config(
        **_SEQUENCE,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=260,
    ),
}
"""A small model of every kind that open_clip can build."""
SPECIALS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>"),
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>"),
    "mt5": ("<pad>", "</s>", "<unk>"),
    "m2m_100": ("<s>", "<pad>", "</s>", "<unk>", "eng_Latn"),
}
"""Special tokens in the order of their ids, from 0."""
AROUND = {
    "bert": ("[CLS]", "[SEP]"),
    "roberta": ("<s>", "</s>"),
    "xlm-roberta": ("<s>", "</s>"),
    "mt5": ("", "</s>"),
    "m2m_100": ("eng_Latn", "</s>"),
}
"""What a tokenizer of the kind puts before and after a text."""


def write_tokenizer(folder: Path, kind: str) -> None:
    """Write a tokenizer of whole words and single letters, with the special tokens of the kind."""
    ids = {token: i for i, token in enumerate((*SPECIALS[kind], *WORDS))}
    ids |= {f"##{chr(c)}": len(ids) + i for i, c in enumerate(range(ord("a"), ord("z") + 1))}
    unknown, padding = (next(t for t in SPECIALS[kind] if k in t.lower()) for k in ("unk", "pad"))
    words = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.normalizer = normalizers.Lowercase()
    around = [token for token in AROUND[kind] if token]
    first, last = AROUND[kind]
    words.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(), special_tokens=[(t, ids[t]) for t in around]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=unknown, pad_token=padding, eos_token=last
    ).save_pretrained(folder)


def write_text_tower(folder: Path, kind: str) -> None:
    """Write the text tower's own settings and its tokenizer."""
    CONFIGS[kind].save_pretrained(folder)
    write_tokenizer(folder, kind)


def hf_clip(folder: Path, kind: str, pooler: str = "mean_pooler", proj: str = "mlp") -> FrozenCLIP:
    """A CLIP with random weights and a text tower of Hugging Face."""
    write_text_tower(folder, kind)
    text: dict[str, Any] = {
        "hf_model_name": str(folder),
        "hf_model_pretrained": False,
        "hf_pooler_type": pooler,
        "hf_proj_type": proj,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CustomTextCLIP(
            embed_dim=24, vision_cfg=dict(RANDOM_CLIP["vision_cfg"]), text_cfg=text
        )
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=CONTEXT_LENGTH)
    return FrozenCLIP(model, tokenizer, name=kind, weights_hash="seed 0")


BIOMEDCLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_tokenizer_name": "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract",
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": CONTEXT_LENGTH,
        },
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}
"""BiomedCLIP's `open_clip_config.json` with smaller numbers and a smaller image tower."""


def write_biomedclip(folder: Path) -> CustomTextCLIP:
    """Write a miniature of BiomedCLIP, with the weights as it is published; return the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(BIOMEDCLIP))
    write_text_tower(folder, "bert")
    model_cfg = json.loads(json.dumps(BIOMEDCLIP["model_cfg"]))
    model_cfg["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CustomTextCLIP(**model_cfg).eval()
    state = model.state_dict()
    # Published before transformers 4.31, which no longer keeps these.
    state["text.transformer.embeddings.position_ids"] = torch.arange(260)[None]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return model
