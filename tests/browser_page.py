"""A bare page for a widget's front end: no kernel, no JupyterLab, only its code, a model of its traits, and a browser."""
import base64
import contextlib
import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--force-color-profile=srgb"]

# A model as anywidget hands it to `render`: traits, change events, and what was sent to the kernel.
MODEL = """
window.show = async (code, traits, bytes) => {
  const listeners = {}, values = { ...traits };
  for (const [name, text] of Object.entries(bytes)) {
    const raw = Uint8Array.from(atob(text), c => c.charCodeAt(0));
    values[name] = new DataView(raw.buffer);
  }
  const model = window.model = {
    values, saved: 0, get: name => values[name], save_changes() { this.saved += 1; },
    set(name, value) { if (values[name] !== value) { values[name] = value; (listeners[name] || []).forEach(f => f()); } },
    on(event, f) { const name = event.replace("change:", ""); (listeners[name] ||= []).push(f); },
    off(event, f) { const name = event.replace("change:", ""); listeners[name] = listeners[name].filter(g => g !== f); },
    listeners,
  };
  const module = window.code = await import(URL.createObjectURL(new Blob([code], { type: "text/javascript" })));
  document.body.replaceChildren();
  const style = document.createElement("style");
  style.textContent = values._css;
  document.body.append(style);
  const el = document.createElement("div");
  document.body.append(el);
  window.close_widget = module.default.render({ model, el });
};
"""


@contextlib.contextmanager
def browser():
    "A headless Chromium."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


def show(page, widget):
    "Render a widget's front end in `page`, with its present traits."
    state = widget.get_state()
    data = {k: base64.b64encode(v).decode() for k, v in state.items() if isinstance(v, (bytes, memoryview))}
    state = {k: v for k, v in state.items() if k not in data and not (k.startswith("_") and k != "_css")}
    state.pop("layout", None), state.pop("tabbable", None), state.pop("tooltip", None)
    page.evaluate("() => {" + MODEL + "}")
    page.evaluate("([code, traits, bytes]) => show(code, traits, bytes)", [widget._esm, state, data])
    page.wait_for_function("!document.querySelector('canvas') || document.fonts.status === 'loaded'")


def move(page, name, value):
    "Move the slider `name` as a person does: one input event. Returns milliseconds from event to drawn canvas."
    page.evaluate("""([name, value]) => { const i = document.querySelector(`input[name=${name}]`);
        i.value = value; i.dispatchEvent(new Event('input', { bubbles: true })); }""", [name, value])
    return float(page.locator(".fvsr").get_attribute("data-draw-ms"))


def pixels(page, at=0):
    "The pixels of the page's canvas number `at`, as bytes."
    return bytes(page.evaluate("""at => { const c = document.querySelectorAll('canvas')[at];
        return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; }""", at))
