# SPDX-License-Identifier: Apache-2.0

"""Parts of anomalib, Lightning, torch and timm that we rely on and that are not promised to stay.

One test for each: when a new version breaks something, the name of the test says what.
"""

import inspect

import anomalib.models
import pytest
import timm
import torch
from anomalib.data import ImageBatch, MVTecAD, PredictDataset
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils.path import DirType
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule, DynamicBufferMixin
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from anomalib.utils.cv import connected_components_cpu
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import functional
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from timm.models import GraphExtractNet, load_state_dict
from torch._higher_order_ops import scan
from torchvision.transforms.v2 import Compose, Resize


def test_discovery_extends_the_modules_that_models_may_come_from() -> None:
    assert "anomalib.models" in anomalib.models.ALLOWED_MODULES
    assert isinstance(anomalib.models.ALLOWED_MODULES, set)


def test_discovery_is_called_at_the_end_of_the_import_of_torch() -> None:
    assert callable(torch._import_device_backends)
    assert torch._is_device_backend_autoload_enabled()


def test_models_are_found_among_the_direct_subclasses() -> None:
    assert Padim in AnomalibModule.__subclasses__()


def test_patch_ae_loads_a_bank_of_another_size() -> None:
    class Bank(DynamicBufferMixin):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("vectors", torch.empty(0, 0))

    bank = Bank()
    bank.load_state_dict({"vectors": torch.ones(3, 2)})
    assert bank.vectors.shape == (3, 2)


def test_patch_ae_exports_its_search_as_a_scan() -> None:
    assert list(inspect.signature(scan).parameters)[:3] == ["combine_fn", "init", "xs"]
    (total,), _ = scan(lambda carry, x: ([carry[0] + x[0]], []), [torch.zeros(2)], [torch.ones(4, 2)])
    assert torch.equal(total, torch.full((2,), 4.0))


def test_the_export_quantises_by_a_method_of_this_name() -> None:
    method = AnomalibModule._post_training_quantization_ov
    assert list(inspect.signature(method).parameters)[-2:] == ["model", "datamodule"]
    assert method.__name__ in inspect.getsource(AnomalibModule._compress_ov_model)


def test_the_export_compresses_by_a_method_of_this_name() -> None:
    method = AnomalibModule._compress_ov_model
    assert list(inspect.signature(method).parameters)[:2] == ["self", "model"]
    assert f"{method.__name__}(model, " in inspect.getsource(AnomalibModule.to_openvino)


def test_the_evaluator_knows_what_a_metric_compares() -> None:
    metrics = Padim.configure_evaluator().test_metrics
    assert {field for metric in metrics for field in metric.fields} >= {"pred_score", "gt_label", "pred_label"}
    assert {"setup", "on_test_batch_end", "on_test_epoch_end"} <= set(dir(Evaluator))


def test_lightning_takes_callbacks_from_a_list() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.callbacks, list)


def test_the_post_processor_sets_thresholds_by_these_names() -> None:
    post_processor = PostProcessor()
    names = {f"_{kind}_threshold" for kind in ("image", "pixel")}
    names |= {f"{kind}_{end}" for kind in ("image", "pixel") for end in ("min", "max")}
    assert names == set(post_processor.state_dict())
    for kind in ("image", "pixel"):
        getattr(post_processor, f"_{kind}_threshold").fill_(3.0)
        getattr(post_processor, f"{kind}_min").fill_(1.0)
        getattr(post_processor, f"{kind}_max").fill_(5.0)
    batch = ImageBatch(image=torch.rand(2, 3, 4, 4), pred_score=torch.tensor([1.0, 4.0]))
    post_processor.post_process_batch(batch)
    assert batch.pred_score.tolist() == [0.0, 0.75]
    assert batch.pred_label.tolist() == [False, True]


def test_post_and_pre_processor_restore_themselves_from_plain_data() -> None:
    for component, other in (
        (PostProcessor(image_sensitivity=0.3), PostProcessor()),
        (PreProcessor(Resize((8, 8))), PreProcessor()),
    ):
        other.load_checkpoint_config(component.checkpoint_config())
        assert other.checkpoint_config() == component.checkpoint_config()


def test_the_pre_processor_has_a_transform_for_exports() -> None:
    assert PreProcessor(Resize((8, 8), antialias=True)).export_transform.antialias is False
    assert get_exportable_transform(None) is None


def test_datamodules_apply_the_resize_of_the_model() -> None:
    resize = Resize((8, 8))
    assert extract_transforms_by_type(Compose([resize]), Resize) == [resize]
    assert "model_transform" in inspect.signature(MVTecAD._update_subset_augmentations).parameters


def test_the_guards_know_the_images_of_a_prediction(stripes) -> None:
    assert len(PredictDataset(stripes / "stripes" / "test").image_filenames) == 10


def test_datamodules_have_their_sets_after_setup(stripes) -> None:
    datamodule = MVTecAD(root=stripes, category="stripes", num_workers=0)
    assert not hasattr(datamodule, "val_data")
    datamodule.setup()
    for dataset in (datamodule.train_data, datamodule.val_data, datamodule.test_data):
        assert {"image_path", "mask_path", "label_index", "label", "split"} <= set(dataset.samples)
        assert dataset.samples.attrs["task"] == dataset.task == "segmentation"
        assert len(dataset.subsample([0])) == 1
    assert DirType.ABNORMAL.value == "abnormal"


def test_the_training_dataloader_is_made_of_these_attributes(stripes) -> None:
    datamodule = MVTecAD(root=stripes, category="stripes", num_workers=0)
    datamodule.setup()
    assert {"train_batch_size", "num_workers", "external_collate_fn"} <= set(vars(datamodule))
    datamodule.train_data = datamodule.train_data.subsample([0, 1])
    datamodule.external_collate_fn = len
    assert list(datamodule.train_dataloader()) == [2]


def test_batches_come_to_the_model_by_these_parts_of_the_trainer() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, precision="bf16-mixed")
    batch = ImageBatch(image=torch.rand(2, 3, 4, 4))
    assert trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)) is not None
    with trainer.precision_plugin.forward_context():
        assert torch.is_autocast_enabled("cpu")


def test_the_arguments_of_a_model_are_saved_whoever_calls_the_constructor() -> None:
    class Mixin:
        def __init__(self, size: int) -> None:
            super().__init__(post_processor=False)

    class Model(Mixin, AnomalibModule):
        trainer_arguments = learning_type = None

        def __init__(self, size: int, width: int) -> None:
            super().__init__(size + 1)

    model = Model(1, width=2)
    assert dict(model.hparams) == {"size": 1, "width": 2}
    model.hparams["size"] = 3
    assert model.hparams["size"] == 3


def test_the_visualizer_finds_the_function_of_a_field_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "visualize_something", len, raising=False)
    assert functional.get_visualize_function("something") is len
    assert ImageVisualizer().output_dir is None


def test_aupro_counts_connected_components() -> None:
    labels = connected_components_cpu(torch.tensor([[[[1.0, 0, 1], [1, 0, 1]]]]))
    assert len(labels.unique()) == 3


def test_checkpoints_are_read_as_plain_data() -> None:
    assert inspect.signature(AnomalibCheckpointIO.load_checkpoint).parameters["weights_only"].default is True
    assert inspect.signature(Padim.load_from_checkpoint).parameters["weights_only"].default is True


def test_the_engine_saves_one_checkpoint() -> None:
    assert {"best_model_path", "last_model_path", "best_k_models", "dirpath"} <= set(vars(ModelCheckpoint()))


def test_validation_is_put_off_and_run_by_parts_of_the_fit_loop() -> None:
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.limit_val_batches = 0
    assert trainer.enable_validation is False
    assert callable(trainer.fit_loop.epoch_loop.val_loop.run)
    assert isinstance(trainer.fit_loop.done, bool)


def test_the_loss_is_seen_before_the_backward_pass() -> None:
    assert "on_before_backward" in inspect.getsource(MixedPrecision.pre_backward) + inspect.getsource(
        MixedPrecision.__mro__[1].pre_backward
    )


def test_timm_reads_weights_without_executing_them() -> None:
    assert "weights_only" in inspect.signature(load_state_dict).parameters


def test_timm_extracts_features_of_any_module() -> None:
    extractor = GraphExtractNet(timm.create_model("resnet18").eval(), ["layer1"], squeeze_out=False)
    [features] = extractor(torch.zeros(1, 3, 64, 64))
    assert features.shape == (1, 64, 16, 16)


def test_timm_prunes_vision_transformers() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    model.prune_intermediate_layers([0, 1], prune_norm=True)
    model.set_input_size((64, 64))
    maps = model.forward_intermediates(
        torch.zeros(1, 3, 64, 64), indices=[0, 1], stop_early=True, intermediates_only=True
    )
    assert len(model.blocks) == 2
    assert [features.shape for features in maps] == [(1, 192, 4, 4)] * 2
