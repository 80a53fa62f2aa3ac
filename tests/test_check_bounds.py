"""`scripts/check_bounds.py`: counts what a GPU's program does, and prints a table of small steps on a CPU."""

import json
import pathlib
import sys

import pytest

from emu3_jax.config import DecoderConfig
from emu3_jax.sharding.costs import count
from emu3_jax.sharding.hlo import Program

pytestmark = pytest.mark.compiled_quickly

# A step of two layers as XLA writes it for GPUs, shortened: a product by cuBLAS, in a fusion, and attention by cuDNN.
GPU = """HloModule jit__step, num_partitions=2

%fused (left: bf16[64,32], right: bf16[32,16]) -> (bf16[64,16], s8[1024]) {
  %left = bf16[64,32]{1,0} parameter(0)
  %right = bf16[32,16]{1,0} parameter(1)
  ROOT %gemm = (bf16[64,16]{1,0}, s8[1024]{0}) custom-call(%left, %right), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
}

%body (p: (s32[], bf16[64,32], bf16[32,16])) -> (s32[], bf16[64,32], bf16[32,16]) {
  %p = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%p), index=1
  %w = bf16[32,16]{1,0} get-tuple-element(%p), index=2
  %product = (bf16[64,16]{1,0}, s8[1024]{0}) fusion(%x, %w), kind=kCustom, calls=%fused
  %made = bf16[64,16]{1,0} get-tuple-element(%product), index=0
  %mixed = (bf16[64,16]{1,0}, u8[0]{0}) custom-call(%made, %made), custom_call_target="__cudnn$fmhaSoftmax"
  %back = (bf16[64,16]{1,0}, u8[0]{0}) custom-call(%made, %made), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %out = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) tuple(%i, %x, %w)
}

%test (q: (s32[], bf16[64,32], bf16[32,16])) -> pred[] {
  %q = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: (s32[], bf16[64,32], bf16[32,16])) -> (s32[], bf16[64,32], bf16[32,16]) {
  %a = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}) while(%a), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
}
"""


@pytest.fixture
def check_bounds(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "scripts"))
    import check_bounds

    return check_bounds


def test_flops_of_a_gpu_program(check_bounds):
    head = {"preset": "8b", "tokens": 64}
    products, attention = check_bounds.executed(Program(GPU), count(GPU)[0], head, rows=1)
    assert products == 2 * (2 * 64 * 16 * 32)
    decoder = DecoderConfig()
    assert attention == 2 * (2 + 5) * 2 * decoder.num_heads * decoder.head_dim * 64 * 65 / 2


def test_flops_of_a_choice_are_those_of_one_branch(check_bounds):
    """Attention chooses between cuDNN and products by cuBLAS that move more bytes."""
    branches = """%few (t: bf16[64,16]) -> bf16[64,16] {
  %t = bf16[64,16]{1,0} parameter(0)
  ROOT %u = bf16[64,16]{1,0} custom-call(%t), custom_call_target="__cudnn$fmhaSoftmax"
}

%many (t: bf16[64,16]) -> bf16[64,16] {
  %t = bf16[64,16]{1,0} parameter(0)
  %s = bf16[64,64]{1,0} custom-call(%t, %t), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %v = bf16[64,16]{1,0} custom-call(%s, %t), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}

"""
    choice = "  %c = bf16[64,16]{1,0} conditional(%i, %made, %made), branch_computations={%many, %few}\n"
    text = GPU.replace("%body", branches + "%body", 1).replace("  ROOT %out", choice + "  ROOT %out")
    head = {"preset": "8b", "tokens": 64}
    products, attention = check_bounds.executed(Program(GPU), count(GPU)[0], head, rows=1)
    chosen, more = check_bounds.executed(Program(text), count(text)[0], head, rows=1)
    assert chosen == products and more == attention * 9 / 7  # two products more than five and two


def test_a_decode_step_leaves_out_skipped_slots(check_bounds):
    """With a kernel, the program names the whole cache, of which a step reads the used part."""
    figures = [{"kernels": "pallas"}]
    figures.append({"bytes_per_step": 900, "cache_bytes": 100, "cache_length": 10, "cache_slots": 40, "pictures": 1})
    figures[-1]["ms_per_step"] = 1e-6
    text = GPU.replace("known_trip_count", "unknown")  # so the loop's body is a step
    step = count(text)[1]
    (line,) = check_bounds.decode_lines("decode", figures, [text], {"copy_gb_per_s": 1000.0})
    assert line["bound_by_shapes"] == 0.9
    assert line["bound_by_program"] == pytest.approx((step.read + step.written - 300) / 1000)


def test_steps_of_several_lengths_share_a_program(check_bounds):
    """XLA compiles one program for each number of pictures and size of the cache."""
    shapes = [(1, 40, 10), (1, 40, 20), (8, 40, 10), (8, 80, 50)]
    names = ("pictures", "cache_slots", "cache_length")
    figures = [{"kernels": "xla"}]
    figures += [
        {"bytes_per_step": 900, "cache_bytes": 100, "ms_per_step": 1, **dict(zip(names, shape, strict=True))}
        for shape in shapes
    ]
    text = GPU.replace("known_trip_count", "unknown")
    texts = [text.replace("64,", f"{rows},") for rows in (64, 6400, 12800)]
    lines = list(check_bounds.decode_lines("decode", figures, texts, {"copy_gb_per_s": 1.0}))
    sizes = [line["gb_by_program"] for line in lines]
    steps = [count(text)[1] for text in texts]
    assert sizes == [round((steps[n].read + steps[n].written) / 1e9, 3) for n in (0, 0, 1, 2)]
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3]
    assert "gb_by_program" not in next(check_bounds.decode_lines("decode", figures, texts[:2], {"copy_gb_per_s": 1.0}))


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_tables(check_bounds, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["check_bounds.py", "--tiny", "--keep", str(tmp_path)])
    assert check_bounds.main() == 0
    told = capsys.readouterr()
    decode, fsdp = (line for line in map(json.loads, told.err.splitlines()) if "part" in line)
    assert 0 < decode["bound_by_shapes"] < decode["bound_by_program"]
    assert fsdp["compute_ms"] > 0 and fsdp["sent_gb"] > 0
    assert {each["kind"] for each in fsdp["collectives"]} >= {"all-gather"}
    assert told.out.count("\n| decode, pictures at once: 1 | ") == told.out.count("\n| fsdp | ") == 1
    assert len(check_bounds.dumped(tmp_path / "fsdp")) == 1
    monkeypatch.setattr(sys, "argv", ["check_bounds.py", "--tiny", "--from", str(tmp_path)])
    assert check_bounds.main() == 0
    assert capsys.readouterr().out == told.out


def test_programs_are_in_the_order_of_their_numbers(check_bounds, tmp_path):
    names = [f"module_{number}.jit_decode.gpu_after_optimizations.txt" for number in ("0007", "99999", "100000")]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [file.name for file in check_bounds.dumped(tmp_path)] == names


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["lora"], "part 'lora' is unknown: choose from decode, fsdp"),
        (["--from", "nowhere"], "nowhere/peaks.json does not exist: give a directory that --keep filled"),
        (["--keep", __file__], f"{__file__} holds something: give an empty or new directory"),
    ],
)
def test_bad_input(check_bounds, monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(sys, "argv", ["check_bounds.py", "--tiny", *arguments])
    with pytest.raises(SystemExit, match="2"):
        check_bounds.main()
    assert error in capsys.readouterr().err
