use crate::support::refusal;

#[test]
fn images_are_of_their_class_and_the_same_every_time() {
    let [one, two] = [(); 2].map(|()| kd_data::open("noise:10x16x25").unwrap());
    let (train, test) = (one.train().unwrap(), one.test().unwrap());
    assert_eq!((train.len(), test.len(), train.classes(), one.info.shape), (25, 10, 10, [3, 16, 16]));
    assert_eq!(train.labels()[..12], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]);
    assert_eq!(one.info.groups.as_deref().unwrap(), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]);
    assert_eq!(train.image(3).unwrap().data, two.train().unwrap().image(3).unwrap().data);
    assert_ne!(train.image(3).unwrap().data, test.image(3).unwrap().data);
    let colour = |i: usize| train.image(i).unwrap().data[..256].iter().map(|&p| f64::from(p)).sum::<f64>() / 256.0;
    // Two images of a class: means of 256 pixels of deviation 37, so within a few units.
    assert!((colour(0) - colour(10)).abs() < 12.0, "{} {}", colour(0), colour(10));
    let far = (1..10).map(|i| (colour(0) - colour(i)).abs()).fold(0.0, f64::max);
    assert!(far > 30.0, "no class has another colour: {far}");
}

#[test]
fn other_shapes_are_refused() {
    for spec in ["noise:10x32", "noise:1x32x10", "noise:10x0x10", "noise:10x32x9", "noise:10x100000x100000", "noise:axbxc"] {
        let message = refusal(kd_data::open(spec));
        assert!(message.contains(spec) && message.contains("expected"), "{message}");
    }
}
