"""Putting a pruned model on the Hub, with a model card that keeps what people wrote into it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmprune.checkpoint.output import REPORT_NAME
from llmprune.checkpoint.source import Checkpoint
from llmprune.report import words
from llmprune.report.card import CARD, model_card
from llmprune.report.page import render
from llmprune.types import RunError, UserError

PAGE = "report.html"
LEFT_OUT = ("lock", "*.writing", "journal.jsonl", ".*", "__pycache__/*")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Upload a finished run with its model card and report; returns what was (or would be) uploaded.

    The repository is created if it is not there (`private` then decides). `revision`: a branch, created if
    needed; `create_pr` opens a pull request instead. `base_model`: Hub id of the dense model, if the recipe
    names a folder; its licence is inherited unless `license` is given. `token`: only if the one that
    huggingface_hub finds is not to be used. A broken upload goes on where it was when repeated. `notes` in the
    answer: what the card or the report lack.

    Raises UserError for a folder that is no finished run and for a refused login, RunError if the Hub fails.
    """
    path = Path(folder)
    report = finished_run(path)
    if create_pr and revision is not None:
        raise UserError(
            f"a pull request goes to the main branch: leave out the revision {revision!r}, or the pull request"
        )
    notes: list[str] = []
    with _failures_understood(repo_id):
        api = HfApi(token=_checked(token))
        lacks = notes if dry_run else None
        existing = _text(path / CARD) or _read_card(api, repo_id, revision, lacks, "repeat the command")
        base, dense = base_model or _base_model(report), _card_of_folder(report)
        if dense is None and base is not None and license is None:
            dense = _read_card(api, base, None, lacks, "repeat the command, or give the licence")
        card = model_card(path, report, repo_id, existing=existing, dense=dense, base=base, license=license)
        written = {CARD: str(card).encode()}
        if not (path / PAGE).is_file():
            written[PAGE] = _page(repo_id, report, notes).encode()
        files = [{"name": name, "bytes": (path / name).stat().st_size} for name in uploaded(path)]
        files += [{"name": name, "bytes": len(content)} for name, content in written.items()]
        planned = {"repo_id": repo_id, "private": private, "revision": revision, "pull_request": create_pr}
        shown = {**planned, "files": files, "card": str(card), "notes": notes}
        if dry_run:
            return shown
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = f"Pruned by llmprune: {words.methods(report)}"
        return {**shown, "url": str(url), **_send(api, path, repo_id, written, message, revision, create_pr)}


def _send(
    api: HfApi,
    folder: Path,
    repo_id: str,
    written: dict[str, bytes],
    message: str,
    revision: str | None,
    create_pr: bool,
) -> dict[str, Any]:
    """The folder in one commit, what was written for the push in another."""
    done = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        commit_message=message,
        ignore_patterns=[*LEFT_OUT, CARD],
    )
    # not by way of the folder: a card left there would win over later edits on the Hub
    api.create_commit(
        repo_id,
        [CommitOperationAdd(name, content) for name, content in written.items()],
        revision=done.pr_revision if create_pr else revision,
        commit_message="Model card and report",
    )
    return {"commit": done.oid, "pull_request_url": done.pr_url}


def finished_run(folder: Path) -> dict[str, Any]:
    """The report of a folder that holds a finished run; raises UserError for anything else."""
    if folder.name.endswith(".partial") or (folder / "journal.jsonl").exists():
        raise UserError(f"{folder} holds an unfinished run; finish it with --resume before it is pushed")
    try:
        report: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text())
        complete = all(key in report for key in ("recipe", "totals", "tensors", "versions", "run"))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} is no finished run of llmprune: it has no readable llmprune.json ({error})"
        ) from error
    if not complete or not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no finished run of llmprune: its llmprune.json or config.json is incomplete")
    Checkpoint(folder)  # every weight file is there and readable
    return report


def uploaded(folder: Path) -> list[str]:
    """The files that a push sends beside the card, by their path in the folder."""
    files = (one.relative_to(folder).as_posix() for one in sorted(folder.rglob("*")) if one.is_file())
    return [name for name in files if not any(fnmatch(name, pattern) for pattern in (*LEFT_OUT, CARD))]


def remote_card(api: HfApi, repo_id: str, revision: str | None = None) -> str | None:
    """The card of a repository as it is now, None if there is none; raises RunError if the Hub does not say which."""
    # in a cache of its own: an older card in the user's would stand in for this one while the Hub fails
    with TemporaryDirectory() as cache:
        try:
            return _text(Path(api.hf_hub_download(repo_id, CARD, revision=revision, cache_dir=cache)))
        except RevisionNotFoundError:
            # a new branch begins as a copy of the main one
            return None if revision is None else remote_card(api, repo_id)
        except (GatedRepoError, LocalEntryNotFoundError) as error:
            reason = _reason(error.__cause__ or error)
            raise RunError(f"the model card of {repo_id} cannot be read ({reason})") from error
        except (RemoteEntryNotFoundError, RepositoryNotFoundError):
            return None


def _read_card(api: HfApi, repo_id: str, revision: str | None, notes: list[str] | None, remedy: str) -> str | None:
    """The card of a repository; a failure of the Hub goes into `notes`, and is raised with its remedy if there are none."""
    try:
        return remote_card(api, repo_id, revision)
    except RunError as error:
        if notes is None:
            raise RunError(f"{error}; {remedy}") from error
        notes.append(str(error))
        return None


def _page(repo_id: str, report: dict[str, Any], notes: list[str]) -> str:
    """The report of the run, without figures where what draws them is not installed."""
    runs = [{**report, "name": repo_id.rpartition("/")[2]}]
    try:
        return render(runs)
    except UserError as error:
        notes.append(f"{PAGE} has no figures: {error}")
        return render(runs, figures=False)


def _base_model(report: dict[str, Any]) -> str | None:
    """The dense model's Hub id, None if it was a folder."""
    found: str | None = report.get("stages", [report])[0].get("hub_model")
    return None if found is None else found.partition("@")[0]


def _card_of_folder(report: dict[str, Any]) -> str | None:
    """The card of the dense model, if that was a folder."""
    model = report["recipe"]["model"]
    return _text(Path(model).expanduser() / CARD) if model and _base_model(report) is None else None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _checked(token: str | None) -> str | None:
    """The token to use, None for the one that the client finds; raises UserError for one that cannot be sent."""
    found = get_token() if token is None else token.strip()
    # the transport would print it: as an illegal header, or as text that it cannot encode
    if found is not None and not re.fullmatch("[!-~]+", found):
        raise UserError(
            "the Hub token is empty, or holds a blank or a character that no token has; copy it again, or run "
            "`hf auth login`"
        )
    return None if token is None else found


@contextlib.contextmanager
def _failures_understood(repo_id: str) -> Iterator[None]:
    """Turn what the client and its transport raise into our errors."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name: {error}") from error
    except LocalTokenNotFoundError as error:
        raise UserError("no Hub token: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise _understood(repo_id, error) from error
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError) and not _of_transport(error):
            raise
        again = "Repeat the command: what is there is kept"
        raise RunError(f"the upload to {repo_id} broke off: {_reason(error)}. {again}") from error


def _of_transport(error: BaseException) -> bool:
    # httpx, or its successor, has exceptions of its own, which are no OSError
    return type(error).__module__.startswith("httpx")


def _reason(error: BaseException) -> str:
    """What went wrong, by its last line; of the transport only the name, since its text can quote what was sent."""
    lines = str(error).strip().splitlines()
    if not lines or (_of_transport(error) and not isinstance(error, HfHubHTTPError)):
        return type(error).__name__
    return lines[-1]


def _understood(repo_id: str, error: HfHubHTTPError) -> UserError | RunError:
    """The Hub's refusal in our terms."""
    status = error.response.status_code if error.response is not None else 0
    reason = _reason(error)
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"the Hub refuses to write to {repo_id} ({status}): {reason}. Log in with `hf auth login` or set HF_TOKEN "
            "to a token that may write there"
        )
    if 400 <= status < 500:
        return UserError(f"the Hub refuses the upload to {repo_id} ({status}): {reason}")
    return RunError(f"the Hub failed ({status}): {reason}. Repeat the command: what is there is kept")
