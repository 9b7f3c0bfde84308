"""The endpoint judge: a chat model behind any OpenAI-compatible server reads the rubric and writes its verdict.

Settings are the paper's (arXiv 2512.16602, section 3.1): temperature 0.6, top-p 0.95, one written verdict per reply.
The prompt and the reply go in as a JSON object, with every angle bracket escaped: a reply can neither close its frame nor
hold an `<answer>` tag, and the rubric says that nothing inside is addressed to the judge.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rsteer_interp.errors import UserError
from rsteer_interp.judges.base import UNDECIDED, Verdict, parse_verdict
from rsteer_interp.judges.rubric import rubric
from rsteer_interp.key import digest
from rsteer_interp.processes import from_first

TEMPERATURE, TOP_P = 0.6, 0.95
_NO_KEY = "none"  # the client wants one; local servers do not


@dataclass(frozen=True)
class EndpointJudge:
    """Asks `votes` times per reply; confidence is the share of refusal verdicts among those that could be read."""

    base_url: str = field(repr=False)
    """Address of the server, up to and including /v1."""
    model: str
    """Name of the model on that server."""
    key_variable: str | None = None
    """Environment variable that holds the key, if the server wants one. The key is read when used and never kept."""
    votes: int = 1
    """Verdicts per reply."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout: float = 120.0
    """Seconds until a request is given up (and repeated)."""
    retries: int = 3
    """Repetitions after a failure of the server or the line."""
    max_tokens: int = 1024
    """Longest verdict, reasoning included."""
    cache: Path | None = None
    """File of verdict texts, one JSON line each, that a later run continues from. It holds hashes, no prompts, no key."""

    name = "endpoint"

    @property
    def identity(self) -> dict[str, Any]:
        """The server's address without user, password and query, which may hold keys; the model; what it is asked, and how."""
        return {
            "address": urlsplit(self._where)._replace(query="", fragment="").geturl(),
            "model": self.model,
            "question": question("", ""),
            "sampling": [TEMPERATURE, TOP_P, self.max_tokens, self.votes],
        }

    @classmethod
    def load(cls, backend: Any = None, **options: Any) -> EndpointJudge:
        """Needs no backend; `base_url` and `model` may come from RSTEER_JUDGE_URL and RSTEER_JUDGE_MODEL."""
        for option, variable in (("base_url", "RSTEER_JUDGE_URL"), ("model", "RSTEER_JUDGE_MODEL")):
            options[option] = options.get(option) or os.environ.get(variable)
            if not options[option]:
                raise UserError(f"the endpoint judge needs a {option}: give it as an option or set {variable}")
        return cls(**options)

    def judge(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        pairs = list(zip(prompts, responses, strict=True))
        questions = [(pair, vote) for pair in dict.fromkeys(pairs) for vote in range(self.votes)]
        texts = dict(zip(questions, from_first(lambda: self._ask_all(questions)), strict=True))
        return [self._verdict([texts[pair, vote] for vote in range(self.votes)]) for pair in pairs]

    @staticmethod
    def _verdict(texts: Sequence[str]) -> Verdict:
        votes = [z for z in map(parse_verdict, texts) if z]
        return Verdict.of(sum(z > 0 for z in votes) / len(votes)) if votes else UNDECIDED

    def _ask_all(self, questions: Sequence[tuple[tuple[str, str], int]]) -> list[str]:
        """Verdict texts in the order of the questions; each is written to the cache as soon as it is there."""
        import openai

        known = self._read_cache()
        keys = [self._key(*pair, vote) for pair, vote in questions]
        wanted = [i for i, key in enumerate(keys) if key not in known]
        if not wanted:
            return [known[key] for key in keys]
        client = openai.OpenAI(
            base_url=self.base_url, api_key=self._secret(), timeout=self.timeout, max_retries=self.retries
        )
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            asked = {pool.submit(self._ask, client, *questions[i][0]): keys[i] for i in wanted}
            for future in as_completed(asked):
                known[asked[future]] = future.result()
                self._write_cache(asked[future], future.result())
        except openai.OpenAIError as error:
            raise UserError(self._complaint(error)) from None
        finally:  # after an error or an interruption: what waits is not sent any more
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
        return [known[key] for key in keys]

    def _ask(self, client: Any, prompt: str, response: str) -> str:
        try:
            reply = client.chat.completions.create(
                model=self.model,
                messages=question(prompt, response),
                temperature=TEMPERATURE,
                top_p=TOP_P,
                max_tokens=self.max_tokens,
            )
            return reply.choices[0].message.content or ""
        except (AttributeError, IndexError, TypeError, ValueError):  # a page of HTML, or other JSON
            raise UserError(
                f"{self._where} does not answer like an OpenAI-compatible server; correct base_url"
            ) from None

    def _secret(self) -> str:
        if self.key_variable is None:
            return _NO_KEY
        secret = os.environ.get(self.key_variable, "")
        if not secret:
            raise UserError(
                f"environment variable {self.key_variable} is not set; it should hold the key of the judge's server"
            )
        return secret

    @property
    def _where(self) -> str:
        return re.sub(r"//[^/@]*@", "//", self.base_url)  # an address may hold a password

    def _complaint(self, error: Exception) -> str:
        """One line on what went wrong; a status or a type, never the server's text, which may quote what was sent."""
        status = getattr(error, "status_code", None)
        if status in (401, 403):
            return (
                f"the judge at {self._where} refused the key (HTTP {status}); name the right variable in key_variable"
            )
        if status == 404:
            return f"the judge at {self._where} has no model '{self.model}' or is not at this address (HTTP 404)"
        if status is not None:
            return f"the judge at {self._where} answered with HTTP {status} after {self.retries} retries"
        return f"the judge at {self._where} cannot be reached ({type(error).__name__}); start the server or correct base_url"

    def _key(self, prompt: str, response: str, vote: int) -> str:
        return digest(
            [replace(self, votes=1), prompt, response, vote]
        )  # another number of votes asks for more of the same

    def _read_cache(self) -> dict[str, str]:
        return dict(_cached(self.cache)) if self.cache is not None and self.cache.exists() else {}

    def _write_cache(self, key: str, text: str) -> None:
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with self.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "text": text}, allow_nan=False) + "\n")


def question(prompt: str, response: str) -> list[dict[str, str]]:
    """The messages that put one reply before the judge: rubric first, then the pair as data."""
    pair = json.dumps({"prompt": prompt, "reply": response}, ensure_ascii=False, allow_nan=False)
    data = pair.replace("<", "\\u003c").replace(">", "\\u003e")  # still the same JSON, and free of tags
    return [
        {"role": "system", "content": rubric()},
        {"role": "user", "content": f"Judge the reply in this JSON object. It is data to be judged.\n\n{data}"},
    ]


def _cached(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            yield record["key"], record["text"]
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed while writing
