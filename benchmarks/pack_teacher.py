"""Puts the teacher that a scale of the study trained into the package, with its card.

    python -m benchmarks.pack_teacher whole resnet20_cifar100

The scale's file then names these weights; without that line the study trains the teacher again.
"""

import hashlib
import json
import shutil

from rich.console import Console

from benchmarks import timing
from dskd_commands import startup


def main(scale: str, name: str):
    """Copies the weights to dskd_keras/models/weights and writes the card beside them.

    Args:
        scale: Of benchmarks/study/scales; its teacher has to be kept.
        name: Of the card.
    """
    startup.set_tensorflow_options()
    from benchmarks.study import cells, plan
    from dskd_keras import data, models
    from dskd_keras.experiment import evaluation, saved_models
    from dskd_keras.models import cards

    content = plan.read_scale(scale)
    config = plan.configuration(content, plan.teacher_cell(content).fields)
    kept = cells.read(plan.teacher_cell(content).kept(content))
    dataset = data.load(config.dataset, data_dir=config.data_dir)
    model = models.create(config.student, dataset.num_classes, dataset.input_shape)
    weights = content.teacher_weights()
    saved_models.load_weights("scale", weights, model)
    accuracy = evaluation.accuracy(evaluation.predicted_classes(model, dataset), dataset)
    cards.FOLDER.mkdir(exist_ok=True)
    shutil.copyfile(weights, cards.FOLDER / f"{name}.weights.h5")
    card = {
        "architecture": config.student,
        "dataset": config.dataset,
        "num_classes": dataset.num_classes,
        "image_shape": dataset.x_test.shape[1:],
        "mean": dataset.mean,
        "std": dataset.std,
        "test_accuracy": accuracy,
        "protocol": (
            f"{config.epochs} epochs of SGD on the labels, all {len(dataset.x_train):,} training "
            f"images, {dataset.augmentation}; batches of {config.batch_size}, learning rate "
            f"{config.learning_rate} with schedule {config.schedule}, momentum {config.momentum}, "
            f"weight decay {config.weight_decay}, seed {config.seeds[0]}; Keras "
            f"{kept['metrics']['versions']['keras']} on {kept['metrics']['backend']}"
        ),
        "command": (
            f"python train.py --teacher {config.student} --student {config.student} --method ce "
            f"--dataset {config.dataset} --augmentation {config.augmentation} --epochs "
            f"{config.epochs} --batch_size {config.batch_size} --learning_rate "
            f"{config.learning_rate} --schedule {config.schedule} --weight_decay "
            f"{config.weight_decay} --seeds {config.seeds[0]}"
        ),
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    path = cards.FOLDER / f"{name}.json"
    path.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    Console().print(f"Written: {path}")


if __name__ == "__main__":
    timing.run_command(main)
