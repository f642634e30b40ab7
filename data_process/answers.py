"""Answers of language models, kept as they come: a file that is only added to, and what an OpenAI-compatible endpoint says."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from utils import UserError, parse_json, regular_file, say

KEY = "OPENAI_API_KEY"
ATTEMPT = (
    "{attempt}"  # as a setting's value: 0, 1, …, so that a malformed answer does not come again from the same seed
)
SHORTEST_SECRET = 8  # keys such as "none", for endpoints that want no key, are words that an answer may have
REFUSALS_AT_FIRST = 3  # so many refused questions and no answer: the fault lies in the settings, not in a question

Ask = tuple[str, str]  # key of a request, prompt
Keep = Callable[[str, str, dict[str, int]], None]  # key, answer, tokens


def without_secret(text: str, secret: str) -> str:
    """`text` with stars in place of `secret`."""
    return text.replace(secret, "***") if len(secret) >= SHORTEST_SECRET else text


@dataclass
class AnswerFile:
    """Every answer ever paid for, one JSON object a line: `{"key", "answer", "tokens"}`, oldest first by key.

    A line that was cut off by a kill is passed over, and the next one starts on a line of its own.
    """

    path: Path
    secret: str = ""
    answers: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "answer": 0})

    def __post_init__(self) -> None:
        torn = 0
        if os.path.lexists(self.path):
            for line in regular_file(self.path).read_bytes().splitlines():
                try:
                    row = parse_json(line)
                    key, answer = row["key"], row["answer"]
                    if not isinstance(answer, str):
                        raise ValueError("no text")
                    self.answers.setdefault(key, []).append(answer)
                except (ValueError, TypeError, KeyError):
                    torn += bool(line.strip())
        if torn:
            say(f"warning: {self.path}: {torn} lines are no answers and are passed over")

    def keep(self, key: str, answer: str, tokens: dict[str, int]) -> None:
        """Add an answer, on the disk at once. The API key never gets there, even if the endpoint repeats it."""
        answer = without_secret(
            answer.encode("utf-8", "replace").decode(), self.secret
        )  # or it could not be read again
        self.answers.setdefault(key, []).append(answer)
        for name, count in tokens.items():
            self.tokens[name] += count
        line = json.dumps({"key": key, "answer": answer, "tokens": tokens}, ensure_ascii=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); the same command goes on") from None


@dataclass
class Endpoint:
    """An OpenAI-compatible endpoint. The official client backs off and tries again on 408, 409, 429, 5xx, and silence."""

    base_url: str
    model: str
    concurrency: int
    retries: int
    timeout: float
    settings: dict[str, Any]  # of every question: temperature, max_tokens, …
    refused: int = 0
    answered: int = 0

    @property
    def secret(self) -> str:
        """The API key out of the environment, or nothing."""
        return os.environ.get(KEY, "").strip()

    @property
    def place(self) -> str:
        """The URL without user, password and query: what may be written down."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def check(self) -> None:
        """Refuse what cannot work before anything is asked. Raises UserError."""
        try:
            parts = urlsplit(self.base_url)
            bad = parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1
        except ValueError:
            bad = True
        if bad:
            raise UserError("--base_url: give an address such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(f"--base_url: leave user, password and query out; the key belongs into {KEY}")
        if not self.secret and parts.hostname == "api.openai.com":
            raise UserError(f"{KEY} is not set in the environment; {self.place} wants a key")

    def ask(self, questions: Iterable[Ask], system: str, attempt: int, keep: Keep) -> None:
        """Ask all `questions`, `concurrency` at a time, and `keep` each answer as it comes.

        `attempt` 1 and later: asked before, and the answer was malformed. A question that the endpoint refuses (400, 422:
        its filter, too long) is left without answer and counted.

        Raises:
            UserError: no connection, wrong key or model, or the endpoint fails even after all retries.
        """
        asyncio.run(self._ask(iter(questions), system, attempt, keep))

    async def _ask(self, questions: Iterator[Ask], system: str, attempt: int, keep: Keep) -> None:
        from openai import AsyncOpenAI

        settings = {"max_retries": self.retries, "timeout": self.timeout}
        async with AsyncOpenAI(base_url=self.base_url, api_key=self.secret or "none", **settings) as client:
            errors: list[UserError] = []

            async def work() -> None:
                for key, prompt in questions:  # shared: each question goes to one worker
                    try:
                        await self._one(client, key, prompt, system, attempt, keep)
                    except UserError as error:
                        errors.append(error)
                    if errors:  # nothing more is asked; what is on its way is paid for, so it is waited for
                        return

            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(work())
            if errors:
                raise errors[0]

    async def _one(self, client: Any, key: str, prompt: str, system: str, attempt: int, keep: Keep) -> None:
        import openai

        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        settings = {name: attempt if value == ATTEMPT else value for name, value in self.settings.items()}
        try:
            reply = await client.chat.completions.create(model=self.model, messages=messages, extra_body=settings)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            self.refused += 1
            if not self.answered and self.refused >= REFUSALS_AT_FIRST:
                raise self._error(error, "refuses every question") from None
            return
        except openai.APIConnectionError as error:  # silence too
            raise self._error(error, f"does not answer, tried {self.retries + 1} times") from None
        except openai.APIStatusError as error:
            again = error.status_code in (408, 409, 429) or error.status_code >= 500
            tried = f" even after {self.retries + 1} tries" if again else ""
            raise self._error(error, f"says {error.status_code}{tried}") from None
        except (openai.APIError, ValueError, RecursionError) as error:  # the answer's body is not what the client knows
            keep(key, f"unreadable: {type(error).__name__}", {})
            return
        self.answered += 1
        keep(key, _text_of(reply), _tokens_of(reply))

    def _error(self, error: Exception, what: str) -> UserError:
        why = without_secret(" ".join(str(error).split()), self.secret)[:200]
        return UserError(f"{self.place} {what} ({why}); answers so far are kept: the same command goes on from them")


def _text_of(reply: Any) -> str:
    """The answer's text; whatever else comes is nothing."""
    try:
        text = reply.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def _tokens_of(reply: Any) -> dict[str, int]:
    usage = getattr(reply, "usage", None)
    counts = {"prompt": getattr(usage, "prompt_tokens", 0), "answer": getattr(usage, "completion_tokens", 0)}
    return {name: count for name, count in counts.items() if isinstance(count, int)}
