"""How soon the page is ready: ``PYTHONPATH=tests python -m bench.page``. Needs chromium, selenium.

A thousand rollouts of 300 tokens are written, their page is opened from disk seven times, and the
time from the start of the navigation to the end of the page's own start-up is read.
"""

import shutil
import statistics
import tempfile
from pathlib import Path

from selenium import webdriver

import report_folders as make
from topd.report import write_report

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,800"
)
READY = """
const done = arguments[0];
const wait = () => document.documentElement.dataset.ready === "true"
  ? done(performance.now()) : setTimeout(wait, 5);
wait();
"""


def main() -> None:
    """Print the median, least and largest time in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_report(make.training(Path(folder), rollouts=1000, length=300, prompts=250))
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for flag in FLAGS.split():
            options.add_argument(flag)
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        times = []
        for _ in range(7):
            driver.get("about:blank")
            driver.get(path.as_uri())
            times.append(driver.execute_async_script(READY) / 1000)
        driver.quit()
        size = path.stat().st_size / 1e6
    print(
        f"{size:.1f} MB, 1,000 rollouts: ready after {statistics.median(times):.2f} s "
        f"({min(times):.2f} to {max(times):.2f}, 7 loads)"
    )


if __name__ == "__main__":
    main()
