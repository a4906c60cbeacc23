import re
from pathlib import Path

import pytest
import torch
import yaml

from datasets.foreground import rule_for
from models import build_realnet, check_realnet
from models.losses import DETECTOR_LOSSES, build_criterion
from models.sdas import SpacedDiffusion, create_classifier_unet, create_diffusion_unet
from tests.conftest import REALNET, REPOSITORY, settings
from utils import arguments
from utils.config import collect_errors, load_config, plain
from utils.errors import UsageError

SHIPPED = sorted((REPOSITORY / "experiments").glob("*/*.yaml"))
CONFIG = settings("data/tiny", "experiments/tiny")["realnet"]


def written(tmp_path: Path, content: dict | str, name: str = "realnet.yaml") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_settings_are_valid(path):
    config = load_config(path)
    assert config.random_seed == 100


def test_every_data_set_has_its_settings():
    names = {"diffusion", "classifier", "sample", "realnet", "realnet_unified"}
    for dataset in ("MVTec-AD", "VisA", "MPDD", "BTAD"):
        assert {path.stem for path in SHIPPED if path.parent.name == dataset} == names
    assert {path.stem for path in SHIPPED if path.parent.name == "demo"} >= names - {"realnet_unified"}


def test_defaults_and_exponents_without_a_decimal_point(tmp_path):
    text = yaml.safe_dump(CONFIG) + "random_seed: 7\n"
    config = load_config(written(tmp_path, text.replace("lr: 0.001", "lr: 1e-3")))
    assert config.trainer.optimizer.kwargs.lr == 0.001
    assert config.dataset.test.hflip is False
    assert config.saver.keep == 3
    assert type(plain(config)) is dict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"max_epcoh": 3}}, "trainer.max_epcoh is not a setting; did you mean trainer.max_epoch?"),
        ({"trainer": {"max_epoch": "ten"}}, "trainer.max_epoch: 'ten' is not a whole number"),
        ({"trainer": {"max_epoch": True}}, "trainer.max_epoch: True is not a whole number"),
        ({"trainer": 5}, "trainer: has to be a section"),
        ({"dataset": {"input_size": 256}}, "dataset.input_size: 256 is not a list of whole numbers"),
        ({"structure": None}, "structure: None is not a list"),
    ],
)
def test_mistakes_are_named_with_file_and_key(tmp_path, change, message):
    content = {**CONFIG, **change}
    path = written(tmp_path, content)
    with pytest.raises(UsageError) as error:
        load_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_all_mistakes_are_in_one_message(tmp_path):
    with pytest.raises(UsageError) as error:
        load_config(written(tmp_path, {**CONFIG, "trainer": {"a_key": 1, "amp": 2}, "sed": 1}))
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(UsageError, match="criterion is missing"):
        load_config(written(tmp_path, {key: value for key, value in CONFIG.items() if key != "criterion"}))


@pytest.mark.parametrize("text", ["a: [1", "just words", "", "a: {}: b", "x: 1"])
def test_files_that_are_not_settings_are_refused(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=str(path)):
        load_config(path)


def test_overrides_reach_sections_and_lists(tmp_path):
    overrides = [
        "trainer.max_epoch=3",
        "trainer.optimizer.kwargs.lr=1e-5",
        "net.backbone.kwargs.weights=random",
        "structure.0.stride=8",
        "dataset.train.anomaly_types={normal: 0.3, dtd: 0.7}",
        "dataset.input_size=[64, 96]",
    ]
    config = load_config(written(tmp_path, CONFIG), overrides)
    assert config.trainer.max_epoch == 3
    assert config.trainer.optimizer.kwargs.lr == 1e-5
    assert config.net[0].kwargs.weights == "random"
    assert config.structure[0].stride == 8
    assert config.dataset.train.anomaly_types == {"normal": 0.3, "dtd": 0.7}
    assert config.dataset.input_size == [64, 96]


@pytest.mark.parametrize(
    "override", ["trainer.max_epoch", "trainer.max_epoch.x=1", "net.nothing.kwargs=1", "trainer.nothing=1", "a=[1"]
)
def test_bad_overrides_are_refused(tmp_path, override):
    with pytest.raises(UsageError):
        load_config(written(tmp_path, CONFIG), [override])


# ---- what only the networks can check --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("structure.0.layers=[{idx: layer1, planes: 65}]", "layer1, which has 64 channels"),
        ("structure.0.layers=[{idx: layer9, planes: 64}]", "layer9"),
        ("structure=[]", "structure"),
        ("net.backbone.kwargs.backbone=resnet19", "resnet19"),
        ("net.recon.type=models.recon.Other", "models.recon.ReconstructionLayer"),
        ("net.recon.kwargs.hide_channels_ratio=0.3", "multiple of 32"),
        ("net.rrs.kwargs.mode_numbers=[8, 80]", "80"),
        ("net.rrs.kwargs.mode_numbers=[8]", "mode_numbers"),
    ],
)
def test_networks_that_cannot_be_built_say_why(tmp_path, override, match):
    config = load_config(written(tmp_path, CONFIG), [override])
    with pytest.raises(UsageError, match=match):
        build_realnet(config)


@pytest.mark.parametrize("dataset", ["MVTec-AD", "demo"])
def test_the_sections_are_the_arguments_of_the_factories(dataset):
    folder = REPOSITORY / "experiments" / dataset
    with torch.device("meta"):
        for name, create in (("diffusion", create_diffusion_unet), ("classifier", create_classifier_unet)):
            section = "unet" if name == "diffusion" else name
            config = load_config(folder / f"{name}.yaml", [f"{section}.pertrain_path=null"])
            assert create(**config[section]).shape.width == config[section].classifier_width
            assert SpacedDiffusion(**config.TestSampler).num_timesteps > 1


@pytest.mark.parametrize("spelling", ["pertrain_path", "pretrain_path"])
def test_both_spellings_of_the_starting_weights_are_read(spelling):
    overrides = ["unet.pertrain_path=null", f"unet.{spelling}=no.pt"]
    config = load_config(REPOSITORY / "experiments/demo/diffusion.yaml", overrides)
    with pytest.raises(UsageError, match=r"no\.pt does not exist"):
        create_diffusion_unet(**config.unet)


def test_the_small_settings_of_the_tests_build():
    assert build_realnet(REALNET).backbone.needs_calibration


# ---- what reads like a setting and is not one ------------------------------------------------------------------------


def test_a_key_given_twice_is_refused(tmp_path):
    text = yaml.safe_dump(CONFIG) + "random_seed: 1\nrandom_seed: 2\n"
    with pytest.raises(UsageError, match=r"line \d+: not readable as YAML \(the key 'random_seed' is given twice\)"):
        load_config(written(tmp_path, text))


def test_merge_keys_still_work(tmp_path):
    text = yaml.safe_dump({k: v for k, v in CONFIG.items() if k != "trainer"})
    text += "trainer: {<<: {max_epoch: 3}, val_freq_epoch: 1}\n"
    assert load_config(written(tmp_path, text)).trainer.max_epoch == 3


def test_the_file_of_another_script_is_named():
    path = REPOSITORY / "experiments/demo/diffusion.yaml"
    assert load_config(path, script="diffusion").unet
    with pytest.raises(
        UsageError, match=r"holds the settings of a diffusion\.yaml; those of a realnet\.yaml are needed here"
    ):
        load_config(path, script="realnet")


@pytest.mark.parametrize("shares", [{"normal": 0.3333333, "dtd": 0.6666666}, {"normal": float("nan"), "dtd": 1.0}])
def test_rounded_probabilities_are_accepted_and_nan_is_not(tmp_path, shares):
    config = {**CONFIG, "dataset": {**CONFIG["dataset"]}}
    config["dataset"]["train"] = {**CONFIG["dataset"]["train"], "anomaly_types": shares}
    if all(value == value for value in shares.values()):
        assert load_config(written(tmp_path, config)).dataset.train.anomaly_types == shares
    else:
        with pytest.raises(UsageError, match=r"anomaly_types: .* is not finite"):
            load_config(written(tmp_path, config))


@pytest.mark.parametrize("criterion", [[], [{"name": "a", "type": "ImageMSELoss"}]])
def test_losses_that_do_not_fit_the_detector_are_refused(criterion):
    with pytest.raises(UsageError, match=r"criterion.*: .*SegmentCrossEntropyLoss, SegmentFocalLoss, FeatureMSELoss"):
        build_criterion(criterion, DETECTOR_LOSSES)


def test_the_message_of_a_check_names_its_section():
    def fails() -> None:
        raise UsageError("section_counts: is empty")

    with pytest.raises(UsageError, match=r"^x\.yaml: TestSampler: section_counts: is empty$"):
        collect_errors("x.yaml", [("TestSampler", fails)])


def test_class_names_in_settings_stay_in_their_folder(tmp_path):
    with pytest.raises(UsageError, match=r"classes: .* holds '\.\./x', which holds a slash"):
        load_config("experiments/demo/sample.yaml", ["classes=[../x, y]"])


def test_a_programming_error_keeps_its_traceback_when_asked_for(monkeypatch):
    def broken() -> None:
        raise TypeError("a mistake in the code")

    with pytest.raises(UsageError, match=r"a\.yaml: net: TypeError: a mistake in the code \(REALNET_DEBUG=1"):
        collect_errors("a.yaml", [("net", broken)])
    monkeypatch.setenv("REALNET_DEBUG", "1")
    with pytest.raises(TypeError):
        collect_errors("a.yaml", [("net", broken)])


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_layers_without_positions_are_refused_in_one_line(tmp_path, name):
    layer = {"vit_b_16": "heads", "swin_t": "head"}[name]
    overrides = [f"net.backbone.kwargs.backbone={name}", f"structure.0.layers=[{{idx: {layer}, planes: 64}}]"]
    config = load_config(written(tmp_path, CONFIG), overrides)
    with pytest.raises(UsageError, match=rf"{name}'s heads? outputs \(1, 1000\), neither a feature map nor tokens"):
        check_realnet(config)


def test_off_without_quotes_means_off(tmp_path):
    path = written(tmp_path, yaml.safe_dump(CONFIG))
    assert load_config(path, ["trainer.amp=off"]).trainer.amp == "off"
    with pytest.raises(UsageError, match=r"trainer\.channels_last"):
        load_config(path, ["trainer.channels_last=maybe"])


def test_the_error_of_a_value_that_the_shell_has_cut_says_to_quote_it(monkeypatch, capsys):
    words = ["train_realnet.py", "--set", "dataset.train.anomaly_types={normal:", "0.5,", "dtd:", "0.5}"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        arguments.run_parser("x").parse_args()
    assert (
        'put quotes around the whole value: --set "dataset.train.anomaly_types={normal: ..."' in capsys.readouterr().err
    )


NONSENSE = [
    ("structure.0.layers=[{planes: 64}]", "structure.block1.layers.0.idx is missing"),
    (
        "structure.0.layers=[{idx: layer1, planes: 8}, {idx: layer1, planes: 4}]",
        "structure.block1.layers.1.idx: 'layer1'",
    ),
    ("structure.0.layers.0.planes=12.5", "structure.block1.layers.layer1.planes: 12.5 is not a whole number"),
    ("structure.0.nmae=x", "structure.block1.nmae is not a setting; did you mean structure.block1.name?"),
    (f"structure.0.name={'b' * 300}", "structure.0.name: 'bbb"),
    ("structure.0.name=a.b", "structure.a.b.name: 'a.b' has to hold"),
    ("net.backbone.kwargs.depth=3", "net.backbone.kwargs.depth is not a setting"),
    ("net.afs.kwargs.init_bsn=1000000000000", "net.afs.kwargs.init_bsn: 1000000000000 has to be at most"),
    ("net.recon.kwargs.num_res_block=1", "did you mean net.recon.kwargs.num_res_blocks?"),
    ("net.bakbone.kwargs.weights=random", "the list has no entry 'bakbone'; did you mean backbone?"),
    ("structure.neck.stride=4", "the list has no entry 'neck'; it has block1"),
    ("net.backbone.kwargs.weights=checkpoint", "net.backbone.kwargs.weights: 'checkpoint' would leave the backbone"),
    ("net.backbone.kwargs.weights=''", "net.backbone.kwargs.weights: '' is empty"),
    ("net.rrs.kwargs.modes=[max, median]", "net.rrs.kwargs.modes: ['max', 'median'] names 'median'"),
    ("net.rrs.kwargs.modes=[max, max]", "net.rrs.kwargs.modes: ['max', 'max'] holds a value twice"),
    ("net.rrs.kwargs.stop_grad='False'", "net.rrs.kwargs.stop_grad: 'False' is not True or False"),
    ("net.rrs.kwargs.num_residual_layers=1000000", "net.rrs.kwargs.num_residual_layers: 1000000"),
    ("net.rrs.name=recon", "net.3.name: 'recon' is given twice"),
    ("criterion.0.kwargs.weight=-1", "criterion.SegmentCrossEntropyLoss.kwargs.weight: -1 has to be at least 0"),
    ("criterion.0.kwargs.weight=.nan", "kwargs.weight: nan is not finite"),
    ("criterion.0.kwargs.weight=heavy", "kwargs.weight: 'heavy' is not a number"),
    ("criterion.0={name: f, type: SegmentFocalLoss, kwargs: {alpha: 2}}", "criterion.f.kwargs.alpha: 2 has to lie"),
    ("criterion.0={name: f, type: SegmentFocalLoss, kwargs: {gamma: -1}}", "criterion.f.kwargs.gamma: -1"),
    (
        "criterion.0={name: f, type: SegmentFocalLoss, kwargs: {balance_index: 2}}",
        "criterion.f.kwargs.balance_index: 2",
    ),
    ("criterion.1.name=SegmentCrossEntropyLoss", "criterion.1.name: 'SegmentCrossEntropyLoss' is given twice"),
    ("evaluator.metrics={auc: [{name: image, kwargs: {pool: [4, 4]}}]}", "auc.image.kwargs.pool is not a setting"),
    ("evaluator.metrics.acu=[]", "evaluator.metrics.acu is not a setting; did you mean evaluator.metrics.auc?"),
    ("trainer.clip_max_norm=0", "trainer.clip_max_norm: 0 has to be above 0"),
    (f"random_seed={'9' * 400}", "random_seed: 9999"),
    (f"trainer.max_epoch={'9' * 400}", "trainer.max_epoch: 999"),
    ('dataset.type="a\\0b"', "dataset.type: 'a\\x00b' holds a control character"),
    (f"dataset.train.dtd_dir={'x' * 2000}", "dataset.train.dtd_dir"),
    ("saver.checkpoints_dir=''", "saver.checkpoints_dir: '' is empty"),
    (f"saver.log_dir={'x' * 300}", "saver.log_dir: 'xxx"),
    ("dataset.image_reader.kwargs.image_dir=' '", "dataset.image_reader.kwargs.image_dir: ' ' is empty"),
    ("TRAINER={}", "TRAINER is not a setting; did you mean trainer?"),
    ("dataset.Input-Size=[8, 8]", "dataset.Input-Size is not a setting; did you mean dataset.input_size?"),
    ("trainer.schedule.type=linear", "trainer.schedule.type: 'linear' is not one of constant, cosine"),
    ("trainer.max_step=0", "trainer.max_step: 0 has to be at least 1"),
    ("dataset.pixel_mean=[123, 116, 103]", "dataset.pixel_mean: [123, 116, 103] has to be at most 1"),
]


@pytest.mark.parametrize(("override", "says"), NONSENSE, ids=[override[:60] for override, _ in NONSENSE])
def test_nonsense_is_refused_by_its_full_key(tmp_path, override, says):
    with pytest.raises(UsageError) as error:
        load_config(written(tmp_path, CONFIG), [override])
    assert says in str(error.value)
    assert all(len(line) < 400 + len(str(tmp_path)) for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"close": "6"}, "dataset.foreground.close: '6' is not a number of pixels"),
        ({"open": 2.5}, "dataset.foreground.open: 2.5"),
        ({"close": 10**9}, "dataset.foreground.close: 1000000000"),
        ({"invert": "no"}, "dataset.foreground.invert: 'no' is not True or False"),
        ({"threshold": True}, "dataset.foreground.threshold: True"),
        ({"chanel": "red"}, "dataset.foreground.chanel is not a setting; did you mean channel?"),
        ([1], "dataset.foreground: [1] is not none, auto"),
    ],
)
def test_a_foreground_rule_is_checked_by_key(mapping, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        rule_for(mapping, "parts", "bolts", list)


@pytest.mark.parametrize("name", ["const1", "const0.5", "const-1", "const0", "constnan", "const1e9", "constant"])
def test_schedules_that_leave_nothing_of_an_image_are_refused(name):
    with pytest.raises(UsageError, match="beta_scheduler"):
        SpacedDiffusion(1000, "ddim20", name)


@pytest.mark.parametrize("counts", [[5.5], 2.5, True, "ten", [10**30], None, {}])
def test_section_counts_are_whole_numbers(counts):
    with pytest.raises(UsageError, match="section_counts"):
        SpacedDiffusion(1000, counts, "linear")
