"""The app as a whole: its page, and the server that shows it to this machine only unless a password guards it."""

import ipaddress
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from sdlora.errors import SdloraError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr  # noqa: E402

from sdlora.models.load import find  # noqa: E402
from sdlora.web import generate, markup  # noqa: E402
from sdlora.web.library import Library  # noqa: E402
from sdlora.web.studio import Studio  # noqa: E402

CSS = Path(__file__).with_name("app.css")
USER = "sdlora"
LARGEST_UPLOAD = "2gb"


def serve(
    *,
    models: Sequence[str] = ("toybox",),
    libraries: Sequence[str] = (),
    output: str = "outputs/pictures",
    host: str = "127.0.0.1",
    port: int = 7860,
    password: str = "",
    open_browser: bool = False,
) -> None:
    """Show the app until Ctrl-C. models: base models to choose from; libraries: folders with LoRA files
    (none: outputs, which is made).

    A host that other machines can reach needs a password (user name: sdlora). SdloraError: it has none, the port is
    taken, a library is no folder, there is no such model.
    """
    if not (password or _is_loopback(host)):
        raise SdloraError(f"host {host} can be reached by others; give a --password, or leave the host at 127.0.0.1")
    if not 0 < port < 65536:
        raise SdloraError(f"port {port} is none; give one from 1 to 65535 with --port")
    page = build(_studio(models, libraries, output))
    try:
        page.launch(
            server_name=host,
            server_port=port,
            auth=(USER, password) if password else None,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            allowed_paths=[],
            max_file_size=LARGEST_UPLOAD,
            strict_cors=True,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            footer_links=[],
            theme=theme(),
            css_paths=CSS,
        )
    except OSError as error:
        raise SdloraError(f"port {port} of {host} cannot be used; give another one with --port") from error
    try:
        print(f"http://{host}:{port} shows the app" + (f" to the user {USER}" if password else "") + "; Ctrl-C ends it")
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def _studio(models: Sequence[str], libraries: Sequence[str], output: str) -> Studio:
    for model in models:
        find(model)
    library = Library([Path(folder) for folder in libraries]) if libraries else None
    try:
        _made(Path(output))
        library = library or Library([_made(Path("outputs"))])
    except OSError as error:
        raise SdloraError(f"no folder can be made at {output} ({error.strerror}); give another --output") from error
    if library.problem:
        print(f"note: {library.problem}", file=sys.stderr)
    return Studio(tuple(models), library, Path(output))


def _made(folder: Path) -> Path:
    """The folder, there from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(studio: Studio) -> gr.Blocks:
    """The page."""
    # Copies of pictures and uploads go when the app ends; until then uploads are in the library.
    kept = (86400, 365 * 86400)  # seconds between looks, and at most
    with gr.Blocks(title="sdlora", analytics_enabled=False, fill_width=True, delete_cache=kept) as page:
        gr.HTML(markup.HEADER)
        generate.build(studio, page)
    page.queue(max_size=64, default_concurrency_limit=16)
    return page


def theme() -> gr.Theme:
    """Quiet colours, the system's own fonts (nothing is fetched from elsewhere)."""
    return gr.themes.Base(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_shadow="0 1px 2px rgb(15 23 42 / 6%)",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        slider_color="*primary_500",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
