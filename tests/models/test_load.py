"""Loading: whole and streamed give what transformers gives; every kind of bad input gives its own clear error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from rarefy.core.errors import DamagedFileError, NonFiniteError, PathError, UnsupportedModelError
from rarefy.models import load_model
from rarefy.models.store import GgufStore

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def _save(build, path: Path, **options) -> Path:
    build().save_pretrained(path, **options)
    return path


@pytest.fixture
def llama_dir(tmp_path):
    return _save(tiny.llama, tmp_path / "llama")


@pytest.mark.parametrize(
    "build", [tiny.llama, tiny.qwen2, tiny.gemma3, tiny.bert, tiny.distilbert, tiny.albert, tiny.t5]
)
@pytest.mark.parametrize("stream", [True, False])
def test_loads_what_transformers_loads(build, stream, tmp_path):
    path = _save(build, tmp_path / "model")
    loaded = load_model(path, stream=stream)
    expected = getattr(transformers, loaded.architecture).from_pretrained(path).eval()
    assert loaded.streams == stream
    if stream:
        assert all(p.is_meta for p in loaded.model.parameters())
    loaded.materialize("")
    arguments = {"input_ids": IDS}
    if loaded.config["model_type"] == "t5":
        arguments["decoder_input_ids"] = IDS[:, :3]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**arguments)[0], expected(**arguments)[0], rtol=0, atol=0)
    assert loaded.num_parameters() == expected.num_parameters()
    assert loaded.config["architectures"] == [type(expected).__name__]


def test_a_sharded_checkpoint_streams(tmp_path):
    path = _save(tiny.llama, tmp_path / "llama", max_shard_size="20KB")
    assert (path / "model.safetensors.index.json").is_file()
    loaded = load_model(path, stream=True)
    whole = tiny.llama().state_dict()
    for name in whole:
        assert torch.equal(loaded.read(name), whole[name])


def test_one_block_at_a_time_is_in_memory_and_tied_weights_stay_tied(llama_dir):
    loaded = load_model(llama_dir, stream=True)
    blocks = frozenset(f"model.layers.{i}" for i in range(3))
    loaded.materialize("", without=blocks)
    loaded.materialize("model.layers.1")
    held = {name for name, p in loaded.model.named_parameters() if not p.is_meta}
    assert {n for n in held if n.startswith("model.layers.")} == {n for n in held if n.startswith("model.layers.1.")}
    assert "model.layers.1.mlp.up_proj.weight" in held
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    loaded.release("")
    assert all(p.is_meta for p in loaded.model.parameters())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.structure().layer("lm_head").tied_to == "model.embed_tokens"


def test_inspecting_a_stream_counts_zeros_and_stored_bytes(tmp_path):
    path = _save(tiny.qwen2, tmp_path / "q")
    tensors = {k: v.clone() for k, v in load_file(path / "model.safetensors").items()}
    tensors["model.layers.0.mlp.up_proj.weight"][:, ::2] = 0
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, path / "model.safetensors")
    structure = load_model(path, stream=True).structure(count_zeros=True)
    layer = structure.layer("model.layers.0.mlp.up_proj")
    assert layer.num_zeros == 48 * 16
    assert layer.dtype == "bfloat16"
    assert layer.num_bytes == 48 * 32 * 2
    assert structure.layer("model.layers.1.mlp.up_proj").num_zeros == 0


def test_old_checkpoint_names_are_loaded_whole_and_it_says_so(tmp_path):
    path = _save(tiny.bert, tmp_path / "bert")
    tensors = load_file(path / "model.safetensors")
    renamed = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(path, stream=True)
    assert not loaded.streams
    assert "loaded whole" in loaded.notes[-1]
    for name, value in tiny.bert().state_dict().items():
        assert torch.equal(loaded.read(name), value)


def test_a_module_is_taken_as_it_is():
    model = tiny.mlp()
    loaded = load_model(model, stream=True)
    assert loaded.model is model
    assert not loaded.streams
    assert loaded.stored_bytes() == sum(p.numel() for p in model.parameters()) * 4


def test_wrong_paths(tmp_path):
    with pytest.raises(PathError, match="no such file or directory"):
        load_model(tmp_path / "nothing")
    with pytest.raises(PathError, match="no such file or directory"):
        load_model("nothing.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PathError, match=r"without config\.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(PathError, match="not GGUF"):
        load_model(tmp_path / "notes.txt")


def test_a_hub_id_offline_is_a_clear_error(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PathError, match="network connection"):
        load_model("rarefy-tests/there-is-no-such-model")


def test_damaged_gguf(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\xff" * 40)
    with pytest.raises((DamagedFileError, UnsupportedModelError)):
        load_model(path)


@pytest.mark.parametrize("kind", ["Q8_1", "I8"])
def test_a_gguf_type_that_cannot_be_converted_is_unsupported_and_told_at_once(tmp_path, kind):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    model = tiny.llama()
    writer.add_tensor("blk.0.ffn_down.weight", model.model.layers[0].mlp.down_proj.weight.detach().numpy())
    # 40 bytes hold 32 values of Q8_1, a type that llama.cpp computes with and stores nothing in.
    bytes_of_row = {"Q8_1": 40, "I8": 32}[kind]
    data = np.zeros((48, bytes_of_row), dtype=np.uint8 if kind == "Q8_1" else np.int8)
    writer.add_tensor("blk.1.ffn_up.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=rf"m\.gguf: tensor blk\.1\.ffn_up\.weight is stored as {kind}"):
        GgufStore(tmp_path / "m.gguf", model, model.config.to_dict())


def test_what_a_library_says_by_an_exception_without_words_still_has_some(llama_dir, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UnsupportedModelError, match=r"transformers cannot load it \(NotImplementedError\)"):
        load_model(llama_dir)


def test_pickles_are_refused(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(PathError, match="no model weights"):
        load_model(llama_dir)
    (llama_dir / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UnsupportedModelError, match="pickle"):
        load_model(llama_dir)


@pytest.mark.parametrize("keep", [4, 100, 0.5, 0.999])
def test_truncated_safetensors(llama_dir, keep):
    file = llama_dir / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    for stream in (True, False):
        with pytest.raises(DamagedFileError, match=r"model\.safetensors"):
            load_model(llama_dir, stream=stream)


def test_missing_shard_and_bad_index(tmp_path):
    path = _save(tiny.llama, tmp_path / "llama", max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(DamagedFileError, match="does not exist"):
        load_model(path)
    index = path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "../../secret"}}')
    with pytest.raises(DamagedFileError, match="without a folder"):
        load_model(path)
    index.write_text("[1]")
    with pytest.raises(DamagedFileError, match="not a safetensors index"):
        load_model(path)


def test_missing_weights_are_not_made_up(llama_dir):
    tensors = load_file(llama_dir / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama_dir / "model.safetensors", metadata={"format": "pt"})
    for stream in (True, False):
        with pytest.raises(DamagedFileError, match=r"model\.layers\.1\.mlp\.up_proj"):
            load_model(llama_dir, stream=stream)


def test_weights_of_another_shape(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    config["intermediate_size"] = 40
    (llama_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises((DamagedFileError, UnsupportedModelError)):
        load_model(llama_dir)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "never-heard-of"}, "unknown model_type"),
        ({"architectures": ["NeverForCausalLM"]}, "unknown architecture"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
    ],
)
def test_unsupported_configurations(llama_dir, change, match):
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match=match):
        load_model(llama_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_config_that_is_no_json_object(llama_dir, text):
    (llama_dir / "config.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"config\.json"):
        load_model(llama_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_named(llama_dir, value):
    tensors = load_file(llama_dir / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"][3, 4] = value
    save_file(tensors, llama_dir / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(llama_dir, stream=True)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.2\.self_attn\.q_proj.*1 of 1024"):
        loaded.materialize("model.layers.2")


def test_code_beside_a_model_is_never_run(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    config["model_type"] = "custom"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (llama_dir / "config.json").write_text(json.dumps(config))
    (llama_dir / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModelError, match="unknown model_type"):
        load_model(llama_dir)


def test_tokenizer_and_companions_come_along(tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    loaded = load_model(tmp_path / "m", stream=True)
    assert loaded.tokenizer("the river")["input_ids"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(loaded.companions)
    assert loaded.companions["tokenizer.json"] == (tiny_llama_dir / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_gguf_streams_the_weights_that_transformers_loads(smollm2_gguf):
    loaded = load_model(smollm2_gguf, stream=True)
    assert loaded.streams
    assert loaded.architecture == "LlamaForCausalLM"
    assert len(loaded.structure().blocks) == 30
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    for name, value in whole.state_dict().items():
        if "layers." not in name or ".7." in name:
            assert torch.equal(loaded.read(name), value), name
    loaded.materialize("")
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, whole(ids).logits, rtol=0, atol=0)
