"""Draw nbs/images/compare.jpg: bicubic, nano and the original of one frame of data/city, with an enlarged part below."""
from pathlib import Path

from PIL import Image, ImageDraw

from flashvsr_nb.pipeline import FlashVSR, prepare_lq
from flashvsr_nb.video import read_video

ROOT = Path(__file__).resolve().parent.parent
FRAME, LEFT, TOP, WIDTH, HEIGHT = 12, 370, 90, 150, 90  # the part, in HR pixels


def main():
    lr, hr = (read_video(ROOT / f"data/city_{k}.mp4", frames=25) for k in ("lr", "hr"))
    sr = FlashVSR.from_pretrained("nano").upscale(lr, progress=False)[FRAME]
    lq, (rows, cols) = prepare_lq(lr[FRAME:FRAME + 1])  # what nano starts from: torch's bicubic
    bicubic = ((lq[0, :, 0, rows, cols].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    sheet = Image.new("RGB", (900, 362), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, a) in enumerate((("bicubic", bicubic), ("nano", sr), ("original", hr[FRAME]))):
        picture, x = Image.fromarray(a), 302 * i
        part = picture.crop((LEFT, TOP, LEFT + WIDTH, TOP + HEIGHT)).resize((296, 178), Image.NEAREST)
        sheet.paste(picture.resize((296, 178), Image.LANCZOS), (x, 0))
        sheet.paste(part, (x, 182))
        s = 296 / hr.shape[2]
        draw.rectangle([x + LEFT * s, TOP * s, x + (LEFT + WIDTH) * s, (TOP + HEIGHT) * s], outline="yellow")
        draw.text((x + 6, 4), name, fill="white", stroke_width=2, stroke_fill="black")
    (ROOT / "nbs/images").mkdir(exist_ok=True)
    sheet.save(ROOT / "nbs/images/compare.jpg", quality=90)


if __name__ == "__main__":
    main()
