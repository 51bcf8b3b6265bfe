"""A browser for tests: a widget's front end on a bare page, and whole notebooks in JupyterLab."""
import base64
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCREENSHOTS = ROOT / ".work" / "browser"  # kept after a run, ignored by git
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--force-color-profile=srgb"]

# A model as anywidget hands it to `render`: traits and change events; it counts what would go to the kernel.
MODEL = """() => { window.show = async (code, css, traits, bytes) => {
  const listeners = {}, values = { ...traits };
  for (const [name, text] of Object.entries(bytes)) {
    values[name] = new DataView(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
  }
  const list = event => (listeners[event] ||= []);
  const model = window.model = {
    values, listeners, saved: 0, get: name => values[name], save_changes() { model.saved += 1; },
    set(name, value) {
      if (values[name] === value) return;
      values[name] = value;
      list(`change:${name}`).forEach(f => f());
    },
    on(event, f) { list(event).push(f); },
    off(event, f) { listeners[event] = list(event).filter(g => g !== f); },
  };
  const module = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  const style = document.createElement("style"), el = document.createElement("div");
  style.textContent = css;
  document.body.replaceChildren(style, el);
  window.close_widget = module.default.render({ model, el });
}; }"""


def why_not():
    "The reason why no browser test can run here, or None."
    if CHROMIUM is None:
        return "no Chromium found: apt-get install chromium"
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "Playwright is missing: pip install playwright (no browser download is needed)"


@contextlib.contextmanager
def browser():
    "A headless Chromium; pages log their errors to its list `problems`."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def show(page, widget):
    "Render a widget's front end in `page` from its present traits."
    state = {k: v for k, v in widget.get_state().items() if not k.startswith("_")}
    data = {k: base64.b64encode(v).decode() for k, v in state.items() if isinstance(v, (bytes, memoryview))}
    plain = {k: v for k, v in state.items() if k not in data and k not in ("layout", "tabbable", "tooltip")}
    page.evaluate(MODEL)
    page.evaluate("a => show(...a)", [widget._esm, widget._css, plain, data])
    page.wait_for_selector(".fvsr canvas")
    settle(page)


def settle(page):
    "Wait until decoded pictures have been drawn."
    page.evaluate("""async () => { for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);
                     await new Promise(done => setTimeout(done, 150)); }""")


def move(root, name, value):
    "Move the slider `name` in the widget `root` by one input event; milliseconds to the drawn canvas and to its frame."
    root.evaluate("""async (root, [name, value]) => {
        delete root.dataset.frameMs;
        const input = root.querySelector(`[name=${name}]`);
        input.value = value;
        input.dispatchEvent(new Event(input.tagName === 'SELECT' ? 'change' : 'input', { bubbles: true }));
        for (let i = 0; i < 60 && !root.dataset.frameMs; i++) await new Promise(requestAnimationFrame);
    }""", [name, value])
    return tuple(float(root.get_attribute(f"data-{kind}-ms")) for kind in ("draw", "frame"))


def watch(root, name, value, *, quiet=700, most=8000):
    "Move a slider; milliseconds from its event to the first and to the last frame in which a canvas shows something else."
    return root.evaluate("""async (root, [name, value, quiet, most]) => {
        const input = root.querySelector(`[name=${name}]`), canvases = [...root.querySelectorAll('canvas')];
        const look = canvas => { // a sum over all pixels; canvases are drawn by software here, so reading one is cheap
            const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            return new Uint32Array(data.buffer).reduce((sum, x) => Math.imul(sum ^ x, 16777619) >>> 0, canvas.height);
        };
        const all = () => canvases.map(look).join();
        const frame = () => new Promise(done => requestAnimationFrame(() => {
            const c = new MessageChannel(); c.port1.onmessage = done; c.port2.postMessage(0); }));
        let shown = all(), first = null, last = null, now;
        await frame();
        input.value = value;
        const start = performance.now();
        input.dispatchEvent(new Event(input.tagName === 'SELECT' ? 'change' : 'input', { bubbles: true }));
        do {
            await frame();
            now = performance.now() - start;
            const next = all();
            if (next !== shown) { shown = next; first ??= now; last = now; }
        } while (now < most && now - (last ?? 0) < (last === null ? most : quiet));
        return [first, last];
    }""", [name, value, quiet, most])


def picture(root, at=0):
    "What the widget's canvas number `at` shows now, as an array of uint8 (H,W,4)."
    import numpy as np
    url = root.evaluate("(root, at) => root.querySelectorAll('canvas')[at].toDataURL()", at)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA")).astype(int)


@contextlib.contextmanager
def lab(folder):
    "JupyterLab on a free port, serving `folder`; yields its address with token. It ends with the block."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = folder / "settings"
    for plugin, value in {"notebook-extension/tracker": {"windowingMode": "none"},
                          "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"}}.items():
        path = settings / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    token = base64.b16encode(os.urandom(12)).decode()
    env = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTER_CONFIG_DIR": str(folder / "config"),
           "JUPYTER_DATA_DIR": str(folder / "share"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
           "JUPYTER_TOKEN": token, "OMP_NUM_THREADS": "1",
           "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).close()
                break
            if server.poll() is not None:
                raise RuntimeError(f"JupyterLab ended: {(folder / 'lab.log').read_text()[-1500:]}")
            time.sleep(0.2)
        yield lambda notebook: f"http://127.0.0.1:{port}/lab/tree/nbs/{notebook}?reset&token={token}"
    finally:
        server.terminate()  # it ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def workspace(folder, *notebooks):
    "Copies of notebooks without outputs, beside a link to the data."
    (folder / "nbs").mkdir()
    (folder / "data").symlink_to(ROOT / "data")
    for name in notebooks:
        nb = json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = []
        (folder / "nbs" / name).write_text(json.dumps(nb))


def run_all(page, address, *, seconds):
    "Open a notebook and run all of it; returns once the kernel is idle and its widgets stand there."
    page.goto(address)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=90_000)  # the kernel is connected
    page.click("li.lm-MenuBar-item:has-text('Run')")
    page.click("li[data-command='runmenu:run-all']")
    done = """() => { const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
        return document.querySelector('.jp-OutputArea-output[data-mime-type*=error]') ||
               prompts.length && prompts.every(p => /\\[\\d+\\]/.test(p.textContent)); }"""
    try:
        page.wait_for_function(done, timeout=1000 * seconds)
    except Exception:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "not_finished.png")
        raise
