"""Tiny models of the architectures that fine-tuning must handle, made from their configurations."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from toy_data import title
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEXT = 300  # text tokens of the tokenizers
_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": TEXT}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_LLAMA3_ROPE |= {"original_max_position_embeddings": 64}

# name → (configuration, tokenizer kind, rows of the embedding beyond the tokenizer)
ARCHITECTURES = {
    "llama": (LlamaConfig(**_SMALL, tie_word_embeddings=False), "sentencepiece", 0),
    "llama3": (LlamaConfig(**_SMALL, tie_word_embeddings=False, rope_parameters=_LLAMA3_ROPE), "bpe with bos", 0),
    "mistral": (MistralConfig(**_SMALL, sliding_window=64), "sentencepiece", 0),
    "qwen2": (Qwen2Config(**_SMALL), "bpe", 20),
    "qwen3": (Qwen3Config(**_SMALL, head_dim=8), "bpe", 20),
    "gemma": (GemmaConfig(**_SMALL, head_dim=8, tie_word_embeddings=True), "sentencepiece", 0),
    "smollm": (LlamaConfig(**_SMALL, tie_word_embeddings=True), "bpe", 50),
    "gpt2": (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=TEXT, n_positions=512), "bpe", 0),
}


def corpus() -> list[str]:
    """Enough text for a tokenizer: English letters, the prompts' words, titles."""
    import prompt

    texts = [template["instruction"] for rows in prompt.all_prompt.values() for template in rows]
    return [*texts, prompt.sft_prompt, *(title(i) for i in range(40))]


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`sentencepiece`: LLaMA-like, unknown token 0, BOS and EOS, metaspace; `bpe`: byte-level without BOS, pad is EOS;
    `bpe with bos`: byte-level as LLaMA 3 has it, with BOS and without a pad token.
    """
    if kind.startswith("bpe"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=TEXT,
            special_tokens=["<|end|>"] + ["<|begin|>"] * (kind == "bpe with bos"),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(corpus(), trainer)
        if kind == "bpe":
            return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
        begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", None, begin)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=TEXT, special_tokens=["<unk>", "<s>", "</s>"])
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_model(name: str, target: Path, seed: int = 0, **changes: object) -> PreTrainedModel:
    """Write a tiny base model of architecture `name`, with its tokenizer, to `target`; returns the model (float32).

    `changes` go into the configuration.
    """
    config, kind, spare = ARCHITECTURES[name]
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(seed)
    config = type(config).from_dict(config.to_dict() | {"vocab_size": len(tokenizer) + spare} | changes)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return model
