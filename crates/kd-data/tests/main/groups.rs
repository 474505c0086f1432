use kd_data::groups;

use crate::support::refusal;

#[test]
fn a_file_names_the_group_of_each_class() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("groups.txt");
    let names = ["a", "b", "c"].map(String::from);
    std::fs::write(&path, "birds\nfish\n\nbirds\n").unwrap();
    assert_eq!(groups::read(&path, &names).unwrap(), [0, 1, 0]);
    std::fs::write(&path, "7\n7\n2").unwrap();
    assert_eq!(groups::read(&path, &names).unwrap(), [0, 0, 1]);
    std::fs::write(&path, "7\n7").unwrap();
    let message = refusal(groups::read(&path, &names));
    assert!(
        message.contains("groups.txt") && message.contains("2 lines") && message.contains("3 classes") && message.contains("`c`"),
        "{message}"
    );
    assert!(refusal(groups::read(&dir.path().join("none"), &names)).contains("none"));
}

#[test]
fn sets_take_groups_and_normalisation() {
    let splits = kd_data::open("digits").unwrap();
    let digits = splits.clone().with_groups(vec![0, 1, 0, 1, 0, 1, 0, 1, 0, 1]).unwrap();
    for set in [digits.train().unwrap(), digits.test().unwrap()] {
        assert_eq!(set.info().groups.as_deref(), Some(&[0, 1, 0, 1, 0, 1, 0, 1, 0, 1][..]));
    }
    assert_eq!(digits.fingerprint(), splits.fingerprint());
    assert!(refusal(splits.clone().with_groups(vec![0; 9])).contains("each of the 10 classes"));
    let other = kd_data::Normalise::new(&[0.25], &[0.5]);
    assert_eq!(splits.clone().with_normalise(other.clone()).unwrap().test().unwrap().info().normalise, other);
    assert!(refusal(splits.with_normalise(kd_data::Normalise::new(&[0.25], &[0.0]))).contains("positive"));
}
