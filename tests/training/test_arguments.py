"""The arguments: fields and their checks, "config.json --field value", and what upstream does with them."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass, field

import pytest
from transformers import HfArgumentParser, IntervalStrategy, Seq2SeqTrainingArguments, TrainingArguments

from kd_trainer import DIVERGENCES, DistillationArguments, DistillationTrainingArguments, parse_args

CPU = {"use_cpu": True, "report_to": "none"}


@dataclass
class Script:
    """A class of the script's own: a required field, a list, a flag that is on by default."""

    model_name: str
    sizes: list[int] = field(default_factory=lambda: [1])
    shuffle: bool = True
    alpha: float = 0.5  # its own alpha is nobody else's business


def write(folder, **content) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return str(path)


# ---- parse_args ----


def test_json_alone(tmp_path):
    args = parse_args(
        DistillationTrainingArguments,
        argv=[
            write(
                tmp_path, output_dir=str(tmp_path), kd_alpha=0.25, kd_divergence="jsd", kd_beta=0.3, max_steps=7, **CPU
            )
        ],
    )
    assert isinstance(args, DistillationTrainingArguments)
    assert (args.kd_alpha, args.kd_divergence, args.kd_beta, args.max_steps) == (0.25, "jsd", 0.3, 7)
    assert args.kd_temperature == 3.0


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, output_dir="a", kd_alpha=0.25, kd_temperature=2.0, learning_rate=0.1, **CPU)
    argv = [path, "--kd_alpha", "0.5", "--learning_rate=1e-4", "--kd_remap_labels", "--output_dir", str(tmp_path)]
    args = parse_args(DistillationTrainingArguments, argv=argv)
    assert (args.kd_alpha, args.kd_temperature, args.learning_rate, args.kd_remap_labels) == (0.5, 2.0, 1e-4, True)
    assert args.output_dir == str(tmp_path)


def test_the_command_line_alone(tmp_path):
    args = parse_args(
        DistillationTrainingArguments, argv=["--output_dir", str(tmp_path), "--kd_alpha", "1", "--use_cpu"]
    )
    assert args.kd_alpha == 1.0
    assert args.use_cpu is True


def test_argv_is_the_process_own_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", write(tmp_path, kd_alpha=0.1)])
    assert parse_args(DistillationArguments).kd_alpha == 0.1


def test_several_classes_in_their_order(tmp_path):
    path = write(tmp_path, output_dir=str(tmp_path), model_name="x", sizes=[2, 3], shuffle=False, alpha=0.9, **CPU)
    script, args = parse_args(Script, DistillationTrainingArguments, argv=[path, "--kd_alpha", "0.5"])
    assert script == Script("x", [2, 3], False, 0.9)
    assert args.kd_alpha == 0.5
    script, args = parse_args(
        Script, DistillationArguments, argv=["--model_name", "y", "--sizes", "4", "5", "--no_shuffle"]
    )
    assert script == Script("y", [4, 5], False)
    assert args == DistillationArguments()


def test_a_required_field_may_stand_in_either_place_but_not_in_none(tmp_path, capsys):
    assert parse_args(Script, argv=[write(tmp_path, model_name="x")]).model_name == "x"
    assert parse_args(Script, argv=[write(tmp_path), "--model_name", "y"]).model_name == "y"
    with pytest.raises(SystemExit):
        parse_args(Script, argv=[write(tmp_path)])
    assert "required: --model_name" in capsys.readouterr().err


def test_a_dict_field_in_json_and_on_the_command_line(tmp_path):
    kwargs = {"dtype": "bfloat16", "revision": "main"}
    path = write(tmp_path, teacher_model_init_kwargs=kwargs)
    assert parse_args(DistillationArguments, argv=[path]).teacher_kwargs == kwargs
    other = ["--teacher_model_init_kwargs", '{"dtype": "float16"}']
    assert parse_args(DistillationArguments, argv=[path, *other]).teacher_kwargs == {"dtype": "float16"}
    assert parse_args(DistillationArguments, argv=other).teacher_kwargs == {"dtype": "float16"}
    assert DistillationArguments().teacher_kwargs == {}


def test_null_in_json_is_none(tmp_path):
    args = parse_args(DistillationArguments, argv=[write(tmp_path, kd_beta=None, teacher_model_init_kwargs=None)])
    assert args.kd_beta is None
    assert args.teacher_kwargs == {}


@pytest.mark.parametrize("name", ["kd_alfa", "kd_alpha_"])
def test_unknown_keys_and_options_name_the_nearest(name, tmp_path):
    with pytest.raises(
        ValueError, match=rf"`{name}` is 0.5; expected no such key of the JSON file.*Did you mean `kd_alpha`\?"
    ):
        parse_args(DistillationArguments, argv=[write(tmp_path, **{name: 0.5})])
    with pytest.raises(ValueError, match=rf"`{name}` is .*; expected no such option.*Did you mean `kd_alpha`\?"):
        parse_args(DistillationArguments, argv=[f"--{name}", "0.5"])
    with pytest.raises(ValueError, match=rf"`{name}` is .*; expected no such option"):
        parse_args(DistillationArguments, argv=[f"--{name}=0.5"])


def test_an_option_half_typed_is_unknown():
    with pytest.raises(ValueError, match=r"`kd_temp` is .*Did you mean"):
        parse_args(DistillationArguments, argv=["--kd_temp", "2"])


def test_words_that_are_no_option(tmp_path):
    with pytest.raises(ValueError, match=r"`argv` is \['.*config\.json'\]; expected options.*Give the JSON file first"):
        parse_args(DistillationArguments, argv=["--kd_alpha", "0.5", write(tmp_path)])


def test_missing_broken_and_wrong_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`config file` is '.*none\.json'; expected an existing JSON file\. Check the"
    ):
        parse_args(DistillationArguments, argv=[str(tmp_path / "none.json")])
    broken = tmp_path / "broken.json"
    broken.write_text('{"kd_alpha": 0.5,}')
    with pytest.raises(ValueError, match=r"expected valid JSON \(.*line 1 column 1\d.*\)\. Fix the file at that line"):
        parse_args(DistillationArguments, argv=[str(broken)])
    broken.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"expected a JSON object, got a list"):
        parse_args(DistillationArguments, argv=[str(broken)])


def test_values_are_checked_from_every_source(tmp_path):
    with pytest.raises(ValueError, match=r"`kd_alpha` is 1.5; expected a number in \[0, 1\]"):
        parse_args(DistillationArguments, argv=["--kd_alpha", "1.5"])
    with pytest.raises(TypeError, match=r"`kd_alpha` is '0.5'; .*Give `kd_alpha` as a number, not as str"):
        parse_args(DistillationArguments, argv=[write(tmp_path, kd_alpha="0.5")])


# ---- upstream's own ways ----


def test_the_plain_parser_works_as_well(tmp_path):
    parser = HfArgumentParser(DistillationTrainingArguments)
    line = ["--output_dir", str(tmp_path), "--kd_alpha", "0.5", "--teacher_model_init_kwargs", '{"a": 1}', "--use_cpu"]
    (args,) = parser.parse_args_into_dataclasses(line)
    assert (args.kd_alpha, args.teacher_kwargs) == (0.5, {"a": 1})
    path = write(tmp_path, output_dir=str(tmp_path), kd_alpha=0.5, teacher_model_init_kwargs={"a": 1}, **CPU)
    (args,) = parser.parse_json_file(path)
    assert (args.kd_alpha, args.teacher_kwargs) == (0.5, {"a": 1})
    (args,) = parser.parse_dict({"output_dir": str(tmp_path), "kd_temperature": 2.0, **CPU})
    assert args.kd_temperature == 2.0


def test_every_field_has_a_help_text():
    for entry in dataclasses.fields(DistillationArguments):
        assert entry.metadata.get("help"), entry.name


def test_every_divergence_is_accepted_by_name():
    for name in DIVERGENCES:
        assert DistillationArguments(kd_divergence=name).kd_divergence == name


def test_the_prefix_keeps_clear_of_upstreams_fields():
    fields = {entry.name for entry in dataclasses.fields(DistillationArguments)}
    assert not fields & {entry.name for entry in dataclasses.fields(TrainingArguments)}
    assert all(name.startswith(("kd_", "teacher_")) for name in fields)


def test_round_trips(tmp_path):
    args = DistillationTrainingArguments(
        output_dir=str(tmp_path), kd_alpha=0.25, kd_schedule="cosine", kd_alpha_end=0.5,
        teacher_model_init_kwargs={"dtype": "bfloat16"}, **CPU,
    )  # fmt: skip
    again = pickle.loads(pickle.dumps(args))
    assert type(again) is type(args)
    assert again.to_dict() == args.to_dict()
    as_json = json.loads(args.to_json_string())
    kept = {name: as_json[name] for name in (f.name for f in dataclasses.fields(DistillationArguments))}
    assert DistillationArguments(**kept) == DistillationArguments.of(args)
    assert dataclasses.replace(DistillationArguments(kd_alpha=0.25), kd_temperature=2.0).kd_alpha == 0.25


def test_in_front_of_another_class_of_arguments(tmp_path):
    @dataclass
    class Mine(DistillationArguments, Seq2SeqTrainingArguments):
        extra: int = 3

    args = Mine(output_dir=str(tmp_path), predict_with_generate=True, kd_alpha=0.5, **CPU)
    assert (args.predict_with_generate, args.kd_alpha, args.extra) == (True, 0.5, 3)
    assert args.logging_strategy is IntervalStrategy.STEPS  # upstream's own __post_init__ has run
    with pytest.raises(ValueError, match="`kd_temperature` is 0;"):
        Mine(output_dir=str(tmp_path), kd_temperature=0, **CPU)
    parsed = parse_args(
        Mine, argv=["--output_dir", str(tmp_path), "--predict_with_generate", "--kd_alpha", "0", "--use_cpu"]
    )
    assert (parsed.predict_with_generate, parsed.kd_alpha) == (True, 0.0)


def test_the_settings_inside_any_arguments(tmp_path):
    assert DistillationArguments.of(TrainingArguments(output_dir=str(tmp_path), **CPU)) == DistillationArguments()
    own = DistillationTrainingArguments(output_dir=str(tmp_path), kd_alpha=0.2, **CPU)
    assert DistillationArguments.of(own) == DistillationArguments(kd_alpha=0.2)


# ---- names borrowed from elsewhere ----


@pytest.mark.parametrize("build", [DistillationArguments, DistillationTrainingArguments])
def test_alpha_and_temperature_are_refused(build):
    with pytest.raises(
        TypeError, match=r"`alpha` is 0.3; expected the argument `kd_alpha`, which weighs the SOFT loss.*Rename"
    ):
        build(alpha=0.3)
    with pytest.raises(TypeError, match=r"`temperature` is 2.0; expected the argument `kd_temperature`\. Rename"):
        build(temperature=2.0)


def test_alpha_is_refused_in_the_file_and_on_the_command_line(tmp_path):
    with pytest.raises(TypeError, match="`kd_alpha`, which weighs the SOFT loss"):
        parse_args(DistillationArguments, argv=[write(tmp_path, alpha=0.3)])
    with pytest.raises(TypeError, match="`kd_alpha`, which weighs the SOFT loss"):
        parse_args(DistillationArguments, argv=["--alpha", "0.3"])


def test_a_subclass_may_have_its_own_alpha():
    @dataclass
    class Mine(DistillationArguments):
        alpha: float = 0.1

    assert Mine(alpha=0.4).alpha == 0.4
