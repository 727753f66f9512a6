//! Medians and their spread.
//!
//! Called by `report`. A comparison is made round by round, since the contestants took turns: the median of the rounds' ratios
//! stands still where the machine's own speed drifts.

/// What many rounds say.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Spread {
    /// The middle value.
    pub median: f64,
    /// A quarter of the rounds is below.
    pub low: f64,
    /// A quarter of the rounds is above.
    pub high: f64,
    /// How many rounds.
    pub rounds: usize,
}

/// `None` without values.
#[must_use]
pub fn spread(values: &[f64]) -> Option<Spread> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Spread {
        median: quantile(&sorted, 0.5)?,
        low: quantile(&sorted, 0.25)?,
        high: quantile(&sorted, 0.75)?,
        rounds: sorted.len(),
    })
}

/// Of sorted values, between two of them in proportion.
#[must_use]
pub fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a share of a length is a place in it"
    )]
    let below = place.floor() as usize;
    let low = *sorted.get(below)?;
    let high = *sorted.get(below + 1).unwrap_or(&low);
    Some(low + (high - low) * place.fract())
}

/// Ours by the peer's, round by round; of the medians if the rounds are not as many.
#[must_use]
pub fn ratio(ours: &[f64], peer: &[f64]) -> Option<Spread> {
    if ours.len() != peer.len() {
        let of_medians = spread(ours)?.median / spread(peer)?.median;
        return spread(&[of_medians]).filter(|ratio| ratio.median.is_finite());
    }
    let ratios: Vec<f64> = ours
        .iter()
        .zip(peer)
        .map(|(ours, peer)| ours / peer)
        .filter(|ratio| ratio.is_finite())
        .collect();
    spread(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_median_and_the_quartiles() {
        let all = spread(&[5.0, 1.0, 4.0, 2.0, 3.0]).expect("values");
        assert_eq!(
            all,
            Spread {
                median: 3.0,
                low: 2.0,
                high: 4.0,
                rounds: 5
            }
        );
        let two = spread(&[1.0, 2.0]).expect("values");
        assert_eq!((two.median, two.low, two.high), (1.5, 1.25, 1.75));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn a_drift_that_both_share_does_not_move_the_ratio() {
        let ours = [100.0, 50.0, 10.0];
        let peer = [50.0, 25.0, 5.0];
        let ratio = ratio(&ours, &peer).expect("values");
        assert_eq!((ratio.median, ratio.low, ratio.high), (2.0, 2.0, 2.0));
    }

    #[test]
    fn a_ratio_to_nothing_is_no_ratio() {
        assert_eq!(ratio(&[1.0], &[0.0]), None);
        assert_eq!(ratio(&[], &[]), None);
        assert_eq!(ratio(&[4.0, 4.0], &[2.0]).expect("medians").median, 2.0);
    }
}
