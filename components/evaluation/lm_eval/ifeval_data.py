"""What IFEval's verifiers need beside Python packages: NLTK's sentence splitter, `punkt_tab`.

lm-eval downloads it when its verifiers are imported; here it must be in place before, and nothing is downloaded behind
the user's back but from the location that `nltk_data` names.
"""

import importlib.util
from pathlib import Path

from components.common.core.errors import UserError
from components.common.storage.locations import existing_path, package_directory, scheme

RESOURCE = "tokenizers/punkt_tab/english"
HOW = (
    "give --nltk_data DIR with tokenizers/punkt_tab in it (`python -m nltk.downloader -d DIR punkt_tab` where there is a "
    "network), or --nltk_data pypi://llama-index-core, a package that carries it"
)


def require_ifeval_data(location: str) -> None:
    """Makes sure that NLTK finds punkt_tab: where it looks by itself (NLTK_DATA), else at the location.

    Raises:
        UserError: it is in neither, or a package of the verifiers is missing.
    """
    missing = [name for name in ("nltk", "langdetect", "immutabledict") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"IFEval needs {', '.join(missing)}: pip install 'lm-eval[ifeval]'")
    import nltk

    if _is_found():
        return
    try:
        folder = nltk_folder(location)
    except UserError as error:
        raise UserError(f"IFEval needs NLTK's punkt_tab, which is not installed: {error}; {HOW}") from error
    nltk.data.path.append(str(folder))
    if not _is_found():
        raise UserError(f"--nltk_data {location}: NLTK finds no {RESOURCE} in {folder}; {HOW}")


def nltk_folder(location: str) -> Path:
    """The folder that holds tokenizers/punkt_tab: the location itself, or inside its package."""
    if scheme(location) != "pypi":
        return existing_path(location, "nltk_data")
    unpacked = package_directory(location).parent
    found = next(unpacked.rglob(RESOURCE), None)
    if found is None:
        raise UserError(f"{location} does not carry it")
    return found.parents[2]


def _is_found() -> bool:
    import nltk

    try:
        nltk.data.find(RESOURCE)
    except LookupError:
        return False
    return True
