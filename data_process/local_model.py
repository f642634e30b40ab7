"""Answers of a causal language model on this machine, by transformers: a stand-in for an endpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_process.answers import Ask, Keep
from data_process.pretrained import load_pretrained
from quiet import silence_libraries
from reading import faults_said
from utils import time_limit

# how an answer begins: given to the model, so that small ones keep to the form
BEGINNINGS = {"preferences": '{"preferences": ["', "user_intention": '{"user_intention": "'}


@dataclass
class LocalModel:
    """A model of a folder or hub id; the first attempt is greedy, later ones are sampled."""

    path: str
    batch_size: int
    max_tokens: int
    temperature: float
    seed: int
    device: str
    dtype: str
    refused: int = 0
    _loaded: tuple[Any, Any] | None = None

    def load(self) -> tuple[Any, Any]:
        """Tokenizer and model, once. Raises UserError."""
        if not self._loaded:
            from transformers import AutoModelForCausalLM

            silence_libraries()
            found = load_pretrained(self.path, "--local_model", AutoModelForCausalLM, self.device, self.dtype)
            found[0].padding_side = found[0].truncation_side = "left"
            self._loaded = found
        return self._loaded

    def ask(self, questions: Iterable[Ask], system: str, attempt: int, keep: Keep) -> None:
        """Answer all `questions`, a batch at a time, and `keep` each answer."""
        import torch

        tokenizer, model = self.load()
        torch.manual_seed(self.seed + attempt)
        questions = iter(questions)
        while group := list(islice(questions, self.batch_size)):
            keys, prompts = zip(*group, strict=True)
            begun = [next(text for name, text in BEGINNINGS.items() if f'"{name}"' in prompt) for prompt in prompts]
            texts = [
                self._frame(tokenizer, system, prompt) + start for prompt, start in zip(prompts, begun, strict=True)
            ]
            for key, start, (answer, tokens) in zip(keys, begun, self._generate(texts, attempt), strict=True):
                keep(key, start + answer, tokens)

    @staticmethod
    def _frame(tokenizer: Any, system: str, prompt: str) -> str:
        """The prompt as the model's chat template has it, or bare."""
        if not tokenizer.chat_template:
            return f"{system}\n\n{prompt}\n\n"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        with (
            faults_said("--local_model", "chat template"),
            time_limit("--local_model: its chat template never ends"),
        ):
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )  # jinja's sandbox

    def _generate(self, texts: list[str], attempt: int) -> list[tuple[str, dict[str, int]]]:
        import torch
        from transformers import GenerationConfig

        tokenizer, model = self.load()
        positions = getattr(model.config, "max_position_embeddings", None) or 4096
        limit = max(1, min(4096, positions - self.max_tokens))
        special = tokenizer.chat_template is None  # a chat template has written them already
        tokens = tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=limit, add_special_tokens=special
        ).to(model.device)
        settings = GenerationConfig(
            max_new_tokens=self.max_tokens,
            do_sample=attempt > 0 and self.temperature > 0,
            temperature=self.temperature if attempt and self.temperature > 0 else None,
            eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.inference_mode():
            made = model.generate(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, generation_config=settings
            )
        asked = tokens.attention_mask.sum(1).tolist()
        made = made[:, tokens.input_ids.shape[1] :]
        answers = tokenizer.batch_decode(made, skip_special_tokens=True)
        lengths = (made != tokenizer.pad_token_id).sum(1).tolist()
        return [
            (answer, {"prompt": prompt, "answer": length})
            for answer, prompt, length in zip(answers, asked, lengths, strict=True)
        ]
