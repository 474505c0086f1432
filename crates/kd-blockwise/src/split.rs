//! Which student block meets which teacher block.

use kd_core::{Error, FeatureSpec, ModelSpec, Result};

use crate::Params;

/// Where block i of each network ends: entry `i - 1` holds the numbers of the student's and of the teacher's own block.
///
/// # Errors
/// A network without blocks, more blocks asked for than one has, a given list that names other blocks.
pub(crate) fn split(student: &ModelSpec, teacher: &ModelSpec, params: &Params) -> Result<Vec<(usize, usize)>> {
    let (given_s, given_t) = (params.student_blocks.as_slice(), params.teacher_blocks.as_slice());
    for (key, spec, given) in [("student_blocks", student, given_s), ("teacher_blocks", teacher, given_t)] {
        let own = spec.blocks.len();
        if own == 0 {
            return Err(Error::refused(format!("{} has no blocks (cuts `block.1`, `block.2`, ..), which block_kd replaces", spec.name)));
        }
        if given.iter().any(|&block| block > own) {
            return Err(Error::param(key, format!("{given:?}"), format!("within 1..={own}, the blocks of {}", spec.name)));
        }
    }
    let most = student.blocks.len().min(teacher.blocks.len());
    let n = [params.blocks, given_s.len(), given_t.len(), most].into_iter().find(|&n| n > 0).unwrap_or(most);
    if n > most {
        let allowed =
            format!("at most {most}: {} has {} blocks, {} {}", student.name, student.blocks.len(), teacher.name, teacher.blocks.len());
        return Err(Error::param("blocks", n, allowed));
    }
    let last = |spec: &ModelSpec| (spec.blocks.len() - n + 1..=spec.blocks.len()).collect::<Vec<_>>();
    let (s, t) = match (given_s, given_t) {
        ([], []) if student.blocks.len() <= teacher.blocks.len() => {
            let s = last(student);
            let t = align(&teacher.blocks, &ends(student, &s));
            (s, t)
        }
        ([], []) => {
            let t = last(teacher);
            (align(&student.blocks, &ends(teacher, &t)), t)
        }
        (s, []) => (s.to_vec(), align(&teacher.blocks, &ends(student, s))),
        ([], t) => (align(&student.blocks, &ends(teacher, t)), t.to_vec()),
        (s, t) => (s.to_vec(), t.to_vec()),
    };
    Ok(s.into_iter().zip(t).collect())
}

fn ends(spec: &ModelSpec, blocks: &[usize]) -> Vec<[usize; 2]> {
    blocks.iter().map(|&i| spec.blocks[i - 1].size).collect()
}

/// As many of `blocks` as `reference` has maps, the last for the last; going backwards, the latest one that is as much larger than the
/// last as the reference's is, else the one right before. What lies between two of them is merged into the later one.
fn align(blocks: &[FeatureSpec], reference: &[[usize; 2]]) -> Vec<usize> {
    let mut chosen = vec![blocks.len()];
    let (end, reference_end) = (blocks[blocks.len() - 1].size, reference[reference.len() - 1]);
    for i in (1..reference.len()).rev() {
        let matches = |&c: &usize| (0..2).all(|axis| blocks[c - 1].size[axis] * reference_end[axis] == reference[i - 1][axis] * end[axis]);
        let latest = chosen[chosen.len() - 1] - 1;
        chosen.push((i..=latest).rev().find(matches).unwrap_or(latest));
    }
    chosen.reverse();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A network whose blocks end in square maps of these sizes.
    fn spec(name: &str, sizes: &[usize]) -> ModelSpec {
        let block = |&size: &usize| FeatureSpec {
            name: String::new(),
            channels: 8,
            size: [size; 2],
            post_relu: true,
            has_preact: false,
            norm_before_relu: None,
        };
        let blocks = sizes.iter().map(block).collect();
        ModelSpec { name: name.to_string(), classes: 10, embedding: 8, input: [3, 32, 32], blocks, stages: vec![], logits_dist: false }
    }

    fn pairs(s: &[usize], t: &[usize], params: &Params) -> Result<Vec<(usize, usize)>> {
        split(&spec("small", s), &spec("large", t), params)
    }

    #[test]
    fn equal_numbers_meet_one_to_one() {
        let plain = Params::default();
        assert_eq!(pairs(&[32, 16, 8], &[32, 16, 8], &plain).unwrap(), [(1, 1), (2, 2), (3, 3)]);
        assert_eq!(pairs(&[16, 8, 4, 2], &[32, 16, 8, 4], &plain).unwrap(), [(1, 1), (2, 2), (3, 3), (4, 4)]);
    }

    #[test]
    fn different_numbers_align_from_the_end_by_equal_reduction() {
        let plain = Params::default();
        assert_eq!(pairs(&[32, 16, 8], &[32, 16, 8, 4], &plain).unwrap(), [(1, 2), (2, 3), (3, 4)]);
        assert_eq!(pairs(&[32, 16, 8], &[32, 16, 8, 4, 4], &plain).unwrap(), [(1, 2), (2, 3), (3, 5)]);
        assert_eq!(pairs(&[32, 16, 8, 4, 4], &[32, 16, 8], &plain).unwrap(), [(2, 1), (3, 2), (5, 3)]);
        // No equal reduction anywhere: the blocks right before.
        assert_eq!(pairs(&[27, 9, 3], &[32, 16, 8, 4], &plain).unwrap(), [(1, 2), (2, 3), (3, 4)]);
        // The latest that matches, as long as enough earlier ones remain.
        assert_eq!(pairs(&[8, 8, 8], &[8, 8, 8, 8, 8], &plain).unwrap(), [(1, 3), (2, 4), (3, 5)]);
        assert_eq!(pairs(&[32, 32, 4], &[32, 4, 4, 4], &plain).unwrap(), [(1, 1), (2, 3), (3, 4)]);
    }

    #[test]
    fn fewer_blocks_can_be_asked_for() {
        let two = Params { blocks: 2, ..Params::default() };
        assert_eq!(pairs(&[32, 16, 8], &[32, 16, 8, 4, 4], &two).unwrap(), [(2, 3), (3, 5)]);
        let message = pairs(&[32, 16], &[32, 16, 8], &Params { blocks: 3, ..Params::default() }).unwrap_err().to_string();
        assert!(message.contains("blocks = 3") && message.contains("at most 2") && message.contains("small"), "{message}");
    }

    #[test]
    fn a_given_split_is_taken() {
        let given = |s: &[usize], t: &[usize]| Params { student_blocks: s.to_vec(), teacher_blocks: t.to_vec(), ..Params::default() };
        assert_eq!(pairs(&[32, 16, 8], &[32, 16, 8, 4], &given(&[1, 3], &[2, 4])).unwrap(), [(1, 2), (3, 4)]);
        assert_eq!(pairs(&[32, 16, 8], &[32, 16, 8, 4], &given(&[2, 3], &[])).unwrap(), [(2, 3), (3, 4)]);
        assert_eq!(pairs(&[32, 16, 8], &[32, 16, 8, 4], &given(&[], &[1, 4])).unwrap(), [(2, 1), (3, 4)]);
        let message = pairs(&[32, 16, 8], &[32, 16, 8, 4], &given(&[2, 4], &[])).unwrap_err().to_string();
        assert!(message.contains("student_blocks") && message.contains("1..=3"), "{message}");
        let message = pairs(&[], &[32, 16], &Params::default()).unwrap_err().to_string();
        assert!(message.contains("small has no blocks"), "{message}");
    }
}
