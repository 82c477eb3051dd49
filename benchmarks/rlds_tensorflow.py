"""Counterpart of `benchmarks.rlds`, run by it in an environment with tensorflow and tensorflow_datasets.

Encoded pictures go through the shuffle buffer, the two of a pair are decoded after it, as published loaders
for Open X-Embodiment do. The time that the buffer takes to fill is not counted in the rate.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

BUFFER = 45_000  # pairs, as published


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def pairs_of(episode: dict, distance: int) -> tf.data.Dataset:
    coded, texts = episode["steps"]["observation"]["image"], episode["steps"]["language_instruction"]
    now = tf.range(tf.shape(coded)[0])
    later = tf.minimum(now + distance, tf.shape(coded)[0] - 1)
    return tf.data.Dataset.from_tensor_slices(
        {"now": tf.gather(coded, now), "later": tf.gather(coded, later), "text": tf.gather(texts, now)}
    )


def augment(pair: dict, side: int) -> dict:
    """Both resized by Lanczos3, to bytes; one draw for both: crop of 0.9 of the area, brightness, contrast,
    saturation, hue, cut to [0, 1] after each; to bytes again.
    """
    frames = tf.stack([tf.io.decode_jpeg(pair[name], channels=3) for name in ("now", "later")])
    frames = tf.image.resize(frames, [side, side], method="lanczos3", antialias=True)
    frames = tf.cast(tf.clip_by_value(tf.round(frames), 0, 255), tf.uint8)
    frames = tf.image.convert_image_dtype(frames, tf.float32)
    size = 0.9**0.5
    top, left = tf.random.uniform([]) * (1 - size), tf.random.uniform([]) * (1 - size)
    box = tf.tile([[top, left, top + size, left + size]], [2, 1])
    frames = tf.image.crop_and_resize(frames, box, [0, 1], [side, side])
    for change in (
        lambda x: tf.image.random_brightness(x, 0.2),
        lambda x: tf.image.random_contrast(x, 0.8, 1.2),
        lambda x: tf.image.random_saturation(x, 0.8, 1.2),
        lambda x: tf.image.random_hue(x, 0.05),
    ):
        frames = tf.clip_by_value(change(frames), 0, 1)
    frames = tf.image.convert_image_dtype(frames, tf.uint8, saturate=True)
    return {"frames": tf.cast(frames, tf.float32) / 255, "text": pair["text"]}


def main() -> None:
    given = json.loads(sys.argv[1])
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    began = time.perf_counter()
    builder = tfds.builder_from_directory(next(Path(given["root"]).iterdir()))
    data = builder.as_dataset(
        split="train", shuffle_files=True, decoders={"steps": tfds.decode.SkipDecoding()}
    )
    data = data.flat_map(lambda episode: pairs_of(episode, given["distance"])).repeat()
    data = data.shuffle(BUFFER).map(lambda pair: augment(pair, given["side"]), num_parallel_calls=1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    draws = data.with_options(options).as_numpy_iterator()
    next(draws)
    opened = time.perf_counter() - began
    for _ in range(given["warm_up"]):
        next(draws)
    memory, began = resident(), time.process_time()
    for _ in range(given["pairs"]):
        next(draws)
    rate = given["pairs"] / (time.process_time() - began)
    found = {"rate": rate, "pairs": given["pairs"], "growth": resident() - memory}
    print(json.dumps(found | {"memory": resident(), "opened": opened}))


if __name__ == "__main__":
    main()
