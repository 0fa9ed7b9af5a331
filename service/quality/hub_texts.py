"""The two texts that papers report perplexity on, by name: fetched from the hub once, into its own cache.

evaluation_text("wikitext-2") --file of a hub data set--> Text

Both come from data sets that hold them as text. HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE hold as for models.
"""

import gzip
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from service.errors import SystemProblem
from service.quality.texts import Text, json_documents

# of the first validation file, joined by spaces: GPTQ's reading of C4, and AQLM's
C4_DOCUMENTS, C4_WINDOWS = 1100, 256


def wikitext_2() -> Text:
    """The raw test split, lines as they are."""
    with zipfile.ZipFile(fetched("wikitext-2", "ggml-org/ci", "wikitext-2-raw-v1.zip")) as archive:
        return Text("wikitext-2", archive.read("wikitext-2-raw/wiki.test.raw").decode())


def c4() -> Text:
    """The beginning of the English validation split."""
    path = fetched("c4", "allenai/c4", "en/c4-validation.00000-of-00008.json.gz")
    documents = json_documents(gzip.decompress(path.read_bytes()).decode(), f"`{path}`")
    return Text.of_documents("c4", islice(documents, C4_DOCUMENTS), " ", C4_WINDOWS)


HUB_TEXTS: dict[str, Callable[[], Text]] = {"wikitext-2": wikitext_2, "c4": c4}


def fetched(name: str, repository: str, file: str) -> Path:
    """The file in the hub's cache. Raises SystemProblem with the way to do without the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SystemProblem(
            f"text `{name}` cannot be fetched ({file} of the hub's data set {repository}): {reason}",
            hint="check the network (HTTPS_PROXY, HF_ENDPOINT, HF_HUB_OFFLINE), or fetch the file elsewhere "
            "and name it: `--text FILE`",
        ) from error
