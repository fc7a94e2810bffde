"""A page with Gradio, for a Space or this machine: draw, edit, caption.

pip install gradio && python integrations/gradio_app.py small-64
"""

import sys

import PIL.Image

import transfuse
from transfuse.images import decode_image, fit


def functions(model: str):
    """Return (draw, edit, caption) of a model; a seed of None, as of an emptied field, is 0."""
    pipe = transfuse.load(model)

    def fitted(image: PIL.Image.Image) -> PIL.Image.Image:
        return PIL.Image.fromarray(fit(decode_image(image), pipe.exported.image_size))

    def draw(prompt: str, negative: str, seed: float | None) -> PIL.Image.Image:
        return pipe(prompt, negative_prompt=negative or None, generator=int(seed or 0)).images[0]

    def edit(image: PIL.Image.Image, instruction: str, seed: float | None) -> PIL.Image.Image:
        return pipe(instruction, image=fitted(image), generator=int(seed or 0)).images[0]

    def caption(image: PIL.Image.Image) -> str:
        return pipe.caption(fitted(image))[0]

    return draw, edit, caption


def page(model: str, gr):
    """Return the page; `gr` is the module gradio. A component belongs to one tab, so each tab makes its own."""
    draw, edit, caption = functions(model)
    text, seed = (lambda label: gr.Text(label=label)), (lambda: gr.Number(0, label="seed"))

    def image():
        return gr.Image(type="pil", format="png")  # Gradio's own format changes pixels

    tabs = [
        gr.Interface(draw, [text("prompt"), text("negative prompt"), seed()], image(), flagging_mode="never"),
        gr.Interface(edit, [image(), text("instruction"), seed()], image(), flagging_mode="never"),
        gr.Interface(caption, [image()], text("caption"), flagging_mode="never"),
    ]
    return gr.TabbedInterface(tabs, ["Draw", "Edit", "Caption"], title="Transfuse")


if __name__ == "__main__":
    import gradio

    page(sys.argv[1] if len(sys.argv) > 1 else "small-64", gradio).launch(
        show_error=True  # a mistake is one line, such as that of a missing image
    )
