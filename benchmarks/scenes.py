"""Scenes a second on one core: scene, picture and caption, as training makes them.

    python benchmarks/scenes.py [--count 4000]

"cold" is a fresh process, which still decodes and scales sprites; "warm" draws the same scenes again.
"""

from __future__ import annotations

import argparse
import time

from emoji_scenes import World, WorldConfig, caption


def rate(world: World, count: int) -> float:
    """Scenes a second over the first ``count`` indices."""
    start = time.perf_counter()
    for index in range(count):
        scene = world.scene(index)
        world.render(scene)
        caption(scene, index)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000, help="scenes for each figure")
    count = parser.parse_args().count
    start = time.perf_counter()
    World(WorldConfig())
    print(f"load: {time.perf_counter() - start:.2f} s")
    for size in (32, 64):
        world = World(WorldConfig(size=size))
        cold, warm = rate(world, count), rate(world, count)
        print(f"{size} px: {cold:,.0f} scenes/s cold, {warm:,.0f} warm")


if __name__ == "__main__":
    main()
