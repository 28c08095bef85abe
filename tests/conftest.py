"""Everything runs offline: models come from packages or are made on the spot."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that share the cores run faster with a thread each. Said before torch is loaded, which reads it then;
    # programs that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


from typing import Any

import pytest
import torch
import transformers
from browser_pages import Page, launched
from hypothesis import HealthCheck, settings
from image_models import load, saved

from lig_lens.show.explorer import write_explorer

# Model runs have no natural time limit; examples are few because each is a whole attribution.
settings.register_profile(
    "lig_lens", deadline=None, derandomize=True, max_examples=3, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lig_lens")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Spread what is long evenly over the others: processes get neighbours, and should have the same to do."""
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    spread = sorted(
        [(n / (len(short) + 1), item) for n, item in enumerate(short)]
        + [((n + 0.5) / len(long), item) for n, item in enumerate(long)],
        key=lambda placed: placed[0],
    )
    items[:] = [item for _, item in spread]


@pytest.fixture
def ids() -> torch.Tensor:
    """Six tokens of the tiny vocabulary, none of them special."""
    return torch.tensor([5, 12, 30, 7, 22, 39])


@pytest.fixture
def corrupted_ids() -> torch.Tensor:
    return torch.tensor([8, 31, 12, 25, 6, 17])


# Not for the whole session: while it lives, an event loop runs that others could not start theirs beside.
@pytest.fixture(scope="module")
def browser():
    driver, chromium = launched()
    with driver as started:
        found = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens explorer pages of Flows; at the end none of them may have noted anything wrong."""
    opened = []

    def opening(flows, link=""):
        opened.append(Page(browser, write_explorer(flows, tmp_path / f"{len(opened)}.html"), link))
        return opened[-1]

    yield opening
    for page in opened:
        page.page.close()
        assert page.wrong == []


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ViT with a head and an image processor."""
    folder = tmp_path_factory.mktemp("vit")
    saved("ViTForImageClassification", folder)
    processor = transformers.ViTImageProcessorPil(size={"height": 12, "width": 12})
    processor.save_pretrained(folder)
    return load(folder)
