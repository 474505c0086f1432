//! The rows as a picture: a dot for each seed, the mean with its 95 % interval, a diamond for the published number.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::ReportRow;

const LINE: i32 = 18;
const TOP: i32 = 46;
const LEFT: i32 = 260;
const WIDTH: i32 = 900;
const RIGHT: i32 = 30;

const OURS: RGBColor = RGBColor(31, 95, 168);
const PAPER: RGBColor = RGBColor(200, 90, 20);
const GRID: RGBColor = RGBColor(215, 215, 215);

/// `None` when no row has a number of ours.
pub(super) fn svg(title: &str, rows: &[ReportRow]) -> Result<Option<String>> {
    let shown: Vec<&ReportRow> = rows.iter().filter(|r| r.last.is_some()).collect();
    if shown.is_empty() {
        return Ok(None);
    }
    let mut text = String::new();
    let size = (WIDTH as u32, (TOP + LINE * shown.len() as i32 + 50) as u32);
    draw(SVGBackend::with_string(&mut text, size), title, &shown).map_err(|e| anyhow!("drawing the plot: {e}"))?;
    Ok(Some(text))
}

fn draw(backend: SVGBackend, title: &str, rows: &[&ReportRow]) -> Result<(), String> {
    let area = backend.into_drawing_area();
    let values = rows.iter().flat_map(|r| {
        let ours = r.runs.iter().filter_map(|s| s.outcome.as_ref()).map(|o| o.last);
        ours.chain(r.published.first().map(|p| p.top1))
    });
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let step = tick_step(high - low);
    let (low, high) = ((low / step).floor() * step, (high / step).ceil().max(low / step + 1.0) * step);
    let x = |v: f64| LEFT + ((v.clamp(low, high) - low) / (high - low) * f64::from(WIDTH - LEFT - RIGHT)) as i32;
    let bottom = TOP + LINE * rows.len() as i32;
    let font = |size: i32, color: &RGBColor| ("sans-serif", size).into_font().color(color);
    let said = |e: DrawingAreaErrorKind<_>| format!("{e:?}");

    area.fill(&WHITE).map_err(said)?;
    area.draw(&Text::new(title.to_string(), (10, 10), font(16, &BLACK))).map_err(said)?;
    let ticks = ((high - low) / step).round() as i32;
    for tick in 0..=ticks {
        let value = low + f64::from(tick) * step;
        area.draw(&PathElement::new([(x(value), TOP - 6), (x(value), bottom)], GRID)).map_err(said)?;
        let centred = font(12, &BLACK).pos(Pos::new(HPos::Center, VPos::Top));
        area.draw(&Text::new(format!("{value:.*}", usize::from(step < 1.0)), (x(value), bottom + 6), centred)).map_err(said)?;
    }
    let axis = font(12, &BLACK).pos(Pos::new(HPos::Center, VPos::Top));
    let legend = "top-1 in percent, last epoch: dots are seeds, bars the mean and its 95 % interval, diamonds the published number";
    area.draw(&Text::new(legend, ((LEFT + WIDTH - RIGHT) / 2 - 60, bottom + 26), axis)).map_err(said)?;
    for (i, row) in rows.iter().enumerate() {
        let y = TOP + LINE * i as i32 + LINE / 2;
        let right = font(12, &BLACK).pos(Pos::new(HPos::Right, VPos::Center));
        area.draw(&Text::new(row.id.clone(), (LEFT - 10, y), right)).map_err(said)?;
        if let Some(mean) = row.last {
            if let Some(half) = mean.half_interval {
                area.draw(&PathElement::new([(x(mean.mean - half), y), (x(mean.mean + half), y)], OURS)).map_err(said)?;
            }
            area.draw(&PathElement::new([(x(mean.mean), y - 6), (x(mean.mean), y + 6)], OURS.stroke_width(3))).map_err(said)?;
        }
        for outcome in row.runs.iter().filter_map(|s| s.outcome.as_ref()) {
            area.draw(&Circle::new((x(outcome.last), y), 3, OURS.mix(0.5).filled())).map_err(said)?;
        }
        if let Some(p) = row.published.first() {
            let at = x(p.top1);
            let diamond = vec![(at - 5, y), (at, y - 5), (at + 5, y), (at, y + 5), (at - 5, y)];
            area.draw(&PathElement::new(diamond, PAPER.stroke_width(2))).map_err(said)?;
        }
    }
    area.present().map_err(said)
}

/// A round distance between the marks of an axis that is `span` long.
fn tick_step(span: f64) -> f64 {
    [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0].into_iter().find(|s| span / s <= 10.0).unwrap_or(20.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_a_few_round_marks() {
        assert_eq!([tick_step(0.0), tick_step(0.9), tick_step(4.0), tick_step(37.0), tick_step(100.0)], [0.1, 0.1, 0.5, 5.0, 10.0]);
    }
}
