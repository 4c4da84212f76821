// English: explanations, each loaded with the first that is asked for.
export default {
  "hyper.batch.help": "How many images are learnt from at once: after each batch the weights are changed. Larger batches are steadier and need more memory.",
  "hyper.epochs.help": "One epoch is one pass over all training images.",
  "hyper.numDevices.help": "GPUs of each machine that train together; on machines without any, processes. Every device takes its part of each batch.",
  "hyper.numNodes.help": "Machines that train together. More than one needs a Ray cluster.",
  "hyper.priority.help": "Among the trainings that wait, a higher number goes first.",
  "hyper.warmStart.help": "Weights that were learnt before, instead of random ones: fewer epochs and fewer images are needed. Tensors are matched by name and shape.\nA file may be of PyTorch (.pt) or safetensors; it is looked into in a sandbox first.",
  "metrics.map.help": "mAP says how well all classes are found and named. For each class, detections are sorted by confidence, and precision is averaged over every level of recall; mAP is the mean over the classes.\nFor example: of 10 detections of cars 8 are cars, so precision is 8/10 = 0.8 at that point. The same is worked out at every recall and for every class, and averaged.\nmAP50 counts a detection as right when its box overlaps the true one with an IoU of at least 0.5; mAP50-95 averages over stricter overlaps up to 0.95.",
  "metrics.precision.help": "The share of detections that are right: TP / (TP + FP).\nFor example, a model that diagnoses cancer in 10 people of whom 8 have it (TP) and 2 do not (FP) has a precision of 8 / 10 = 80%. With high precision there are few false alarms.",
  "metrics.recall.help": "The share of things that are found: TP / (TP + FN).\nFor example, if 10 people have cancer and the model finds 7 of them (TP) and misses 3 (FN), recall is 7 / 10 = 70%. With high recall little is missed.",
  "split.help": "How many images each split holds after preprocessing and augmentation. The model learns from the training split; after each epoch it is measured on the validation split; the test split is seen only at the end.",
};
