//! Majority votes: of several samples of a prompt the answer that most of them give.

use crate::reward::math::Answer;

/// The score of the answer that most samples give; of answers with as many votes the one that was given first wins. Samples
/// without an answer have no vote; where none has one, the score is 0. `None` where the winning sample has no score.
pub(super) fn majority(answers: &[Option<Answer>], scores: &[Option<f64>]) -> Option<f64> {
    // The first sample with each answer, and how many give it.
    let mut candidates: Vec<(usize, &Answer, usize)> = Vec::new();
    for (sample, answer) in answers.iter().enumerate().filter_map(|(sample, answer)| Some((sample, answer.as_ref()?))) {
        match candidates.iter_mut().find(|(_, other, _)| other.equals(answer)) {
            Some((_, _, votes)) => *votes += 1,
            None => candidates.push((sample, answer, 1)),
        }
    }
    let most = candidates.iter().map(|&(_, _, votes)| votes).max();
    match candidates.iter().find(|&&(_, _, votes)| Some(votes) == most) {
        Some(&(winner, _, _)) => scores[winner],
        None => scores.iter().flatten().next().map(|_| 0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote(answers: &[&str], scores: &[f64]) -> Option<f64> {
        let answers: Vec<Option<Answer>> = answers.iter().map(|text| Answer::parse(text).ok()).collect();
        let scores: Vec<Option<f64>> = scores.iter().map(|&score| Some(score)).collect();
        majority(&answers, &scores)
    }

    #[test]
    fn the_most_frequent_answer_wins_and_equal_numbers_are_one_answer() {
        assert_eq!(vote(&["3", "1/2", "0.5", "7"], &[0.0, 1.0, 1.0, 0.0]), Some(1.0));
        assert_eq!(vote(&["3", "1/2", "3", "7"], &[0.0, 1.0, 0.0, 0.0]), Some(0.0));
    }

    #[test]
    fn the_first_of_equals_wins_and_no_answer_is_no_vote() {
        assert_eq!(vote(&["4", "5"], &[1.0, 0.0]), Some(1.0));
        assert_eq!(vote(&["5", "4"], &[0.0, 1.0]), Some(0.0));
        assert_eq!(vote(&["", "", "4"], &[0.0, 0.0, 1.0]), Some(1.0));
        assert_eq!(vote(&["", ""], &[0.0, 0.0]), Some(0.0));
        assert_eq!(majority(&[None], &[None]), None);
    }
}
