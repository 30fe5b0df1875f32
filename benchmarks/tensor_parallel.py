"""stub"""
import argparse
from pathlib import Path
from benchmarks.tensor_parallel_coverage import FRAMEWORKS, coverage
from tests.parallel import architectures
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("coverage", "speed"), required=True)
    parser.add_argument("--families", type=lambda t: t.split(","), default=list(architectures.FAMILIES))
    parser.add_argument("--frameworks", type=lambda t: t.split(","), default=list(FRAMEWORKS))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--keep", type=Path, default=None)
    o = parser.parse_args()
    coverage(o.families, o.frameworks, markdown=o.markdown, seconds=o.limit, keep=o.keep)
if __name__ == "__main__":
    main()
