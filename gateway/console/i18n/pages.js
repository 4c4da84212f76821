// Imported by what needs more than the texts of the frame.
import { need } from "./texts.js";

await need("pages");
