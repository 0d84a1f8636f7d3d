# SPDX-License-Identifier: Apache-2.0

"""One model for all synthetic categories against one each.

``python -m benchmarks.several_products --backbone vit_tiny_patch16_224 --weights WEIGHTS --output several_products``
"""

import argparse
import time
from pathlib import Path

import pandas as pd
from anomalib.engine import Engine
from lightning import seed_everything
from sklearn.metrics import f1_score
from torch.utils.data import DataLoader

from anomalib_recon.data import DemoAD, SeveralCategories
from anomalib_recon.data.drawing import CATEGORIES
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models import SAAE, FeatureInpainting
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor, ProductPostProcessor

MODELS = {
    "SAAE": (SAAE, {"learning_rate": 1e-3}, 10),
    "FeatureInpainting": (FeatureInpainting, {}, 1),
}


def train(name: str, options: argparse.Namespace, root: Path, products: list[str], post_processor: object) -> dict:
    """Train a model on some categories and test it."""
    seed_everything(0)
    model_class, arguments, epochs = MODELS[name]
    model = model_class(
        backbone=options.backbone,
        backbone_weights=options.weights,
        image_size=options.image_size,
        post_processor=post_processor,
        evaluator=RawScoreEvaluator(products=products),
        visualizer=False,
        **arguments,
    )
    # the validation set has no effect: thresholds come from the training images
    datamodule = SeveralCategories(root, products, train_batch_size=8, eval_batch_size=8, num_workers=0)
    engine = Engine(max_epochs=epochs, default_root_dir=options.output, logger=False, enable_progress_bar=False)
    start = time.monotonic()
    engine.fit(model, datamodule=datamodule)
    seconds = time.monotonic() - start
    [metrics] = engine.test(model, datamodule=datamodule, verbose=False)
    loader = DataLoader(datamodule.test_data, batch_size=8, collate_fn=datamodule.test_data.collate_fn)
    labels = [
        (str(path), bool(truth), bool(label))
        for batch in engine.predict(model, dataloaders=loader)
        for path, truth, label in zip(batch.image_path, batch.gt_label, batch.pred_label, strict=True)
    ]
    f1 = {}
    for product in products:
        own = [(truth, label) for path, truth, label in labels if f"/{product}/" in path]
        f1[product] = f1_score(*zip(*own, strict=True))
    return {"seconds": seconds, "metrics": metrics, "f1": f1}


def main() -> None:
    """Print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("several_products"))
    options = parser.parse_args()
    products = list(CATEGORIES)
    for product in products:
        datamodule = DemoAD(root=options.output / "DemoAD", category=product)
        datamodule.prepare_data()
    rows = []
    for name in options.models:
        together = train(name, options, datamodule.root, products, ProductPostProcessor(products))
        common = train(name, options, datamodule.root, products, FalsePositiveRatePostProcessor())
        for product in products:
            alone = train(name, options, datamodule.root, [product], FalsePositiveRatePostProcessor())
            row = {"model": name, "product": product}
            for label, result in (("alone", alone), ("all", together)):
                for metric in ("image_AUROC", "pixel_AUROC"):
                    row[f"{metric} {label}"] = result["metrics"][f"{product}_{metric}"]
            for label, result in (("alone", alone), ("all", together), ("all, one threshold", common)):
                row[f"F1 {label}"] = result["f1"][product]
            rows.append({**row, "fit s alone": alone["seconds"], "fit s all": together["seconds"]})
        table = pd.DataFrame(rows)
        table.to_csv(options.output / "several_products.csv", index=False)
        print(table.round(3).to_markdown(index=False), flush=True)


if __name__ == "__main__":
    main()
