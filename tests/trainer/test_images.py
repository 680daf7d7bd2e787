"""Images in rows: accepted forms, positions, truncation around them, and refused input."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from dpo_trainer.batch.collator import PairCollator
from dpo_trainer.batch.images import ImageInputs
from dpo_trainer.cli import main
from dpo_trainer.data.account import CUT_IMAGES
from dpo_trainer.data.files import load_pairs
from dpo_trainer.data.prepare import Preparation, _prepared, prepare_dataset
from dpo_trainer.data.rows import parse_row
from dpo_trainer.errors import DataError

from .vision import KINDS, build_image, build_processor, build_vision_model, vision_pairs

PLAIN = Preparation(filters=())
USER, ANSWER = {"role": "user", "content": "the film"}, {"role": "assistant", "content": "good"}
ROW = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "bad"}]}
TEXT, PLACE = {"type": "text", "text": "the film"}, {"type": "image"}


def prepared(rows: Any, kind: str = "llava", preparation: Preparation = PLAIN) -> Any:
    return prepare_dataset(rows, build_processor(kind), preparation, name="train_dataset")[0]


def collated(dataset: Any, kind: str = "llava") -> dict[str, Any]:
    collator = PairCollator(images=ImageInputs(build_processor(kind)))
    return collator([dict(row) for row in dataset])


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


# --- forms of images -----------------------------------------------------------------------------------------------


FORMS: dict[str, Callable[[Image.Image, Path], Any]] = {
    "PIL": lambda image, path: image,
    "path": lambda image, path: str(path),
    "Path": lambda image, path: path,
    "bytes": lambda image, path: png(image),
    "object with bytes": lambda image, path: {"bytes": png(image), "path": None},
    "object with a path": lambda image, path: {"bytes": None, "path": str(path)},
    "object with a path alone": lambda image, path: {"path": str(path)},
    "array": lambda image, path: np.array(image),
}


@pytest.mark.parametrize("column", ["images", "image", "images, not in a list"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_gives_the_same_tokens_and_pixels(form: str, column: str, tmp_path: Path) -> None:
    image, path = build_image(3), tmp_path / "one.png"
    image.save(path)
    expected = collated(prepared([{**ROW, "images": [image]}], "qwen2.5-vl"), "qwen2.5-vl")
    value = FORMS[form](image, path)
    row = {**ROW, column.partition(",")[0]: [value] if column == "images" else value}
    found = collated(prepared([row], "qwen2.5-vl"), "qwen2.5-vl")
    assert "model.pixel_values" in found
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in expected.items()
    }


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("feature", ["decoded", "not decoded", "paths", "objects"])
def test_datasets_with_images_of_every_feature(feature: str, column: str, tmp_path: Path) -> None:
    pictures = [build_image(number) for number in range(3)]
    expected = collated(prepared([{**ROW, "images": [image]} for image in pictures]))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for image, path in zip(pictures, paths, strict=True):
        image.save(path)
    values: list[Any] = pictures if "decoded" in feature else [str(path) for path in paths]
    if feature == "objects":
        values = [{"bytes": png(image), "path": None} for image in pictures]
    data = {name: [ROW[name]] * 3 for name in ROW} | {column: values if column == "image" else [[v] for v in values]}
    dataset = datasets.Dataset.from_dict(data)
    if feature == "not decoded":
        one = datasets.Image(decode=False)
        dataset = dataset.cast_column(column, one if column == "image" else datasets.List(one))
    for data_as_given in (dataset, dataset.select([2, 0, 1]).select([1, 2, 0])):
        found = collated(prepared(data_as_given))
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()
        assert found["model.pixel_values"].tolist() == expected["model.pixel_values"].tolist()


def test_an_image_that_was_changed_after_it_was_opened_is_taken_as_it_is(tmp_path: Path) -> None:
    build_image(1, 64, 64).save(tmp_path / "large.png")
    image = Image.open(tmp_path / "large.png")
    image.thumbnail((16, 24))
    stored = prepared([{**ROW, "images": [image]}], "qwen2.5-vl")
    expected = prepared([{**ROW, "images": [image.copy()]}], "qwen2.5-vl")
    assert stored[0]["prompt_ids"] == expected[0]["prompt_ids"]
    assert len(prepared([{**ROW, "images": [str(tmp_path / "large.png")]}], "qwen2.5-vl")[0]["prompt_ids"]) > len(
        expected[0]["prompt_ids"]
    )


def test_another_image_in_a_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    build_image(1, 16, 16).save(path)
    first = prepared([{**ROW, "images": [str(path)]}], "qwen2.5-vl")
    build_image(2, 64, 32).save(path)
    second = prepared([{**ROW, "images": [str(path)]}], "qwen2.5-vl")
    assert len(second[0]["prompt_ids"]) > len(first[0]["prompt_ids"])
    assert first[0]["images_digest"] != second[0]["images_digest"]


def test_pixels_are_not_stored_beside_the_tokens() -> None:
    dataset = prepared(vision_pairs(4))
    assert set(dataset.column_names) == {
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "length",
        "digest",
        "prompt_digest",
        "images_digest",
        "images",
    }


# --- positions of images -------------------------------------------------------------------------------------------


def order_of(dataset: Any, kind: str = "qwen2.5-vl") -> str:
    return build_processor(kind).tokenizer.decode(dataset[0]["prompt_ids"])


def test_without_places_images_stand_at_the_start_of_the_first_users_message() -> None:
    prompt = [{"role": "system", "content": "answer"}, USER, ANSWER, {"role": "user", "content": "the film"}]
    placed = [prompt[0], {"role": "user", "content": [PLACE, PLACE, TEXT]}, *prompt[2:]]
    images = [build_image(1), build_image(2, 40, 16)]
    found, expected = (prepared([{**ROW, "prompt": p, "images": images}], "qwen2.5-vl") for p in (prompt, placed))
    assert found[0]["prompt_ids"] == expected[0]["prompt_ids"]
    text = order_of(found)
    assert text.index("<|start|>user") < text.index("<|vision_start|>") < text.index("the film")


def test_places_are_kept_and_filled_in_their_order() -> None:
    wide, high = build_image(1, 64, 8), build_image(2, 16, 16)
    prompt = [
        {"role": "user", "content": [TEXT, PLACE]},
        ANSWER,
        {"role": "user", "content": [PLACE, {"type": "text", "text": "question"}]},
    ]
    dataset = prepared([{**ROW, "prompt": prompt, "images": [wide, high]}], "qwen2.5-vl")
    text = order_of(dataset)
    spans = [part.count("<|image_pad|>") for part in text.split("<|vision_end|>")[:2]]
    grids = collated(dataset, "qwen2.5-vl")["model.image_grid_thw"]
    assert spans == [int(grid.prod()) // 4 for grid in grids[:2]]
    assert spans[0] != spans[1]
    assert grids[:2].tolist() == grids[2:].tolist(), "the images of both sides"
    assert text.index("the film") < text.index("<|vision_start|>") < text.index("good") < text.index("question")


def test_a_conversation_without_a_prompt_holds_the_places_in_what_both_sides_share() -> None:
    shared = [{"role": "user", "content": [TEXT, PLACE]}]
    row = {"chosen": [*shared, ANSWER], "rejected": [*shared, ROW["rejected"][0]], "images": [build_image(1)]}
    expected = prepared([{**ROW, "prompt": shared, "images": [build_image(1)]}])
    assert list(prepared([row])) == list(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_text_hold_the_image_token(kind: str) -> None:
    token = build_processor(kind).image_token
    row = {"prompt": f"the film {token} question", "chosen": " good", "rejected": " bad", "images": [build_image(1)]}
    dataset = prepared([row], kind)
    expected = build_processor(kind)(text=[row["prompt"]], images=[row["images"]])["input_ids"][0]
    assert dataset[0]["prompt_ids"] == expected
    assert dataset[0]["chosen_ids"][-1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_tokenised_as_without_images(kind: str) -> None:
    processor = build_processor(kind)
    with_images, without = (prepared([{**ROW, "images": images}], kind)[0] for images in ([build_image(1)], []))
    for side in ("chosen_ids", "rejected_ids"):
        assert with_images[side] == without[side]
    assert "good<|end|>" in processor.tokenizer.decode(with_images["chosen_ids"])


def test_several_processes_read_images_as_one_does() -> None:
    rows = vision_pairs(6)
    two = Preparation(filters=(), dataset_num_proc=2, max_length=1000)
    assert list(prepared(rows, preparation=two)) == list(prepared(rows))


def test_places_may_be_numbered_and_have_columns_of_a_table() -> None:
    numbered = [{**TEXT, "index": None}, {**PLACE, "text": None, "index": 0}]
    found, plain = (
        prepared([{**ROW, "prompt": [{"role": "user", "content": content}], "images": [build_image(1)]}])
        for content in (numbered, [TEXT, PLACE])
    )
    assert found[0]["prompt_ids"] == plain[0]["prompt_ids"]


def test_text_in_parts_is_read_as_text_where_there_are_no_images(tokenizer: Any) -> None:
    parts = {
        **ROW,
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "film"}]}],
    }
    found = prepare_dataset([parts], tokenizer, PLAIN, name="train_dataset")[0]
    assert list(found) == list(prepare_dataset([ROW], tokenizer, PLAIN, name="train_dataset")[0])


def test_a_template_that_reads_parts_alone_does_not_lose_text() -> None:
    processor = build_processor("llava")
    prepare_dataset([ROW], processor, PLAIN, name="train_dataset")  # with its original template
    processor.chat_template = (
        "{% for m in messages %}<|start|>{{ m['role'] }}\n{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] }}{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    found = prepare_dataset([ROW], processor, PLAIN, name="train_dataset")[0][0]
    assert processor.decode(found["prompt_ids"]) == "<|start|>user\nthe film<|end|>\n<|start|>assistant\n"
    assert processor.decode(found["chosen_ids"]) == "good<|end|>\n"


# --- truncation ----------------------------------------------------------------------------------------------------


def test_the_same_text_about_another_image_is_no_duplicate() -> None:
    rows = [{**ROW, "images": [build_image(number)]} for number in (1, 2, 1)]
    dataset, account = prepare_dataset(rows, build_processor("llava"), Preparation(), name="train_dataset")
    assert len(dataset) == 2
    assert account.reasons == {"that repeat an earlier one": 1}


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_length_ever_cuts_an_image(kind: str, mode: str) -> None:
    """At every length, either all image tokens and their marks are kept, or the pair is counted as left out."""
    processor = build_processor(kind)
    long = " ".join(["the film question answer"] * 2)
    prompt = [{"role": "user", "content": [{"type": "text", "text": long}, PLACE, {"type": "text", "text": long}]}]
    row = {**ROW, "prompt": prompt, "images": [build_image(1, 16, 16)]}
    whole = prepared([row], kind)[0]["prompt_ids"]
    marks = {token for token in whole if token in processor.tokenizer.added_tokens_decoder} - {0, 1}
    seen = set()
    for length in range(3, len(whole) + 4):
        for limit in ({"max_length": length}, {"max_prompt_length": length}):
            settings = Preparation(filters=(), truncation_mode=mode, **limit)
            found = _prepared(parse_row(row, "row"), processor, settings.of_tokens, strip=False)
            kept, intact = found["prompt_ids"], found["status"] != CUT_IMAGES
            seen.add("left out" if not intact else "cut" if len(kept) < len(whole) else "whole")
            if intact:
                assert [token for token in kept if token in marks] == [token for token in whole if token in marks]
                collated([{**found, "images": row["images"]}], kind)
    assert seen == {"left out", "cut", "whole"}


def test_pairs_whose_images_do_not_fit_are_counted() -> None:
    rows = [{**ROW, "images": [build_image(1, 16, 16)]}, {**ROW, "images": [build_image(2, 64, 64)]}]
    settings = Preparation(filters=(), max_length=40)
    dataset, account = prepare_dataset(rows, build_processor("qwen2.5-vl"), settings, name="train_dataset")
    assert len(dataset) == 1
    assert account.describe().endswith("dropped 1 whose images max_length or max_prompt_length would cut")


# --- refused input -------------------------------------------------------------------------------------------------


IMAGE = build_image(1)
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"prompt": [{"role": "user", "content": [PLACE, TEXT]}]},
        "'prompt' has a place for an image, but the row has no images",
    ),
    ({"prompt": [{"role": "user", "content": [PLACE, TEXT]}], "images": []}, "'prompt' has a place for an image"),
    (
        {"prompt": [{"role": "user", "content": [PLACE, TEXT]}], "images": [IMAGE, IMAGE]},
        "1 places for images, and the row has 2 images",
    ),
    (
        {"chosen": [{"role": "assistant", "content": [PLACE, TEXT]}], "images": [IMAGE]},
        "'chosen' has a place for an image; images belong in the prompt",
    ),
    ({"prompt": [{"role": "system", "content": "x"}], "images": [IMAGE]}, "'prompt' has no user message"),
    (
        {
            "prompt": [{"role": "user", "content": [{**PLACE, "index": 1}, {**PLACE, "index": 0}]}],
            "images": [IMAGE, IMAGE],
        },
        "the places in 'prompt' have the 'index' [1, 0]",
    ),
    ({"images": ["/no/such.png"]}, "an image cannot be read ("),
    ({"images": [b"no image"]}, "an image cannot be read (cannot identify image file"),
    ({"images": [{"bytes": None, "path": None}]}, "an image cannot be stored ("),
    ({"images": [17]}, "an image cannot be stored (expected a path, bytes or a PIL image, found int)"),
    ({"images": [None]}, "'images' contains null instead of an image"),
    ({"images": [IMAGE], "image": IMAGE}, "has both 'images' and 'image'; use one of them"),
    (
        {"prompt": [{"role": "user", "content": [{"type": "video"}]}], "images": [IMAGE]},
        "message 1 of 'prompt' has a part of type 'video' in 'content'; only text and images",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        "has its image in 'image'; images belong in the column 'images'",
    ),
    (
        {"prompt": "<image> a", "chosen": "b", "rejected": "c", "images": []},
        "the row has 1 of the image token '<image>' for 0 images",
    ),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "images": [IMAGE]},
        "the row has 0 of the image token '<image>' for 1 images",
    ),
    (
        {"chosen": [{"role": "assistant", "content": "an <image>"}], "images": [IMAGE]},
        "2 of the image token '<image>' for 1 images",
    ),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_rows_that_do_not_fit_their_images_are_named_in_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        prepared([{**ROW, **change}])
    assert str(caught.value).startswith("train_dataset row 1: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_the_processor_refuses_is_named() -> None:
    rows = [{**ROW, "images": [IMAGE]}, {**ROW, "images": [build_image(1, 2, 800)]}]
    with pytest.raises(
        DataError, match=r"row 2: ImagesOnly fails on the images \(absolute aspect ratio must be smaller"
    ):
        prepared(rows, "qwen2.5-vl")


def test_a_template_without_a_place_for_images_is_named() -> None:
    processor = build_processor("llava")
    processor.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(DataError, match="the chat template writes 0 of the image token '<image>' for 1 images"):
        prepare_dataset([{**ROW, "images": [IMAGE]}], processor, PLAIN, name="train_dataset")


# --- files and the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny vision-language model and its processor."""
    folder = tmp_path_factory.mktemp("tiny-vision")
    build_vision_model("llava").save_pretrained(folder)
    build_processor("llava").save_pretrained(folder)
    return folder


def write_rows(folder: Path, count: int = 6) -> Path:
    """A file of rows, with the images in the same folder."""
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for number, row in enumerate(vision_pairs(count, images=(1, 2, 0))):
        names = [f"pictures/{number}-{place}.png" for place in range(len(row["images"]))]
        for name, image in zip(names, row["images"], strict=True):
            image.save(folder / name)
        lines.append(json.dumps({**row, "images": names}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "parquet with bytes", "folder"])
def test_files_name_images_beside_them_or_hold_them(ending: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if ending == "json":
        path = path.with_suffix(".json")
        path.write_text(json.dumps(rows))
    elif ending == "parquet":
        path = path.with_suffix(".parquet")
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif ending != "jsonl":
        pairs = datasets.Dataset.from_list(vision_pairs(6, images=(1, 2, 0)))
        path = path.with_suffix(".parquet" if "parquet" in ending else "")
        pairs.to_parquet(path) if "parquet" in ending else pairs.save_to_disk(path)
    found, expected = prepared(load_pairs(path)), prepared(vision_pairs(6, images=(1, 2, 0)))
    assert found["prompt_ids"][:] == expected["prompt_ids"][:]
    assert found["images_digest"][:] == expected["images_digest"][:]
    assert collated(found)["model.pixel_values"].tolist() == collated(expected)["model.pixel_values"].tolist()


@pytest.mark.parametrize("more", [[], ["--streaming", "true"], ["--precompute_ref_log_probs", "true"]])
def test_dpo_train_reads_a_file_that_names_images(
    more: list[str], vision_folder: Path, tmp_path: Path, read_jsonl: Callable[..., Any]
) -> None:
    data, run = write_rows(tmp_path / "data"), tmp_path / "run"
    evaluation = ["--eval_data", str(data), "--sample_prompts", "2", "--sample_max_new_tokens", "2"]
    arguments = ["--model", str(vision_folder), "--train_data", str(data), "--output_dir", str(run), "--max_steps", "2"]
    assert (
        main([*arguments, *evaluation, *more, "--use_cpu", "true", "--per_device_train_batch_size", "2", "--quiet"])
        == 0
    )
    logs = [record for record in read_jsonl(run / "metrics.jsonl") if "loss" in record]
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert (run / "processor_config.json").exists()
    assert len(read_jsonl(run / "samples.jsonl")) > 0


def test_dpo_train_names_a_missing_image(
    vision_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data")
    (tmp_path / "data/pictures/1-0.png").unlink()
    arguments = ["--model", str(vision_folder), "--train_data", str(data), "--output_dir", str(tmp_path / "run")]
    assert main([*arguments, "--use_cpu", "true", "--quiet"]) == 2
    assert f"train_dataset ({data}) row 2: an image cannot be read" in capsys.readouterr().err


def test_inspect_counts_image_tokens(vision_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "data")
    arguments = [
        "inspect",
        "--model",
        str(vision_folder),
        "--train_data",
        str(data),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main([*arguments, "--use_cpu", "true", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["layout"] == "padded"
    assert found["plan"]["model"] == "LlavaForConditionalGeneration"
    expected = prepared(vision_pairs(6, images=(1, 2, 0)))
    assert found["lengths"]["prompt"]["most"] == max(map(len, expected["prompt_ids"]))
    assert "<image>" in found["examples"][0]["prompt"]["text"]


def test_a_processor_that_cannot_be_loaded_leaves_text(
    vision_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(vision_folder, folder)
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**config, "processor_class": "Qwen2_5_VLProcessor"}))
    data = write_rows(tmp_path / "data")
    text = tmp_path / "text.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    text.write_text("\n".join(json.dumps({key: row[key] for key in ROW}) for row in rows))
    arguments = ["--model", str(folder), "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--use_cpu", "true"]
    assert main([*arguments, "--train_data", str(text), "--quiet"]) == 0
    assert "its processor cannot be loaded" in caplog.text
    assert main([*arguments[:2], "--output_dir", str(tmp_path / "other"), "--train_data", str(data), "--quiet"]) == 2
    assert "reads text only" in capsys.readouterr().err
