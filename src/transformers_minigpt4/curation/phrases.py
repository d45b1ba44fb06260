"""The phrases that the filter's rules look for, each in lower case; docs/reference/rules.md lists them."""

APOLOGIES = (
    # The first two are the paper's (section 3.2); the others are what such models write in their place.
    *("i'm sorry", "i apologize", "i apologise", "i am sorry", "i am so sorry", "i'm so sorry", "sorry for the"),
    *("sorry about", "my apologies", "i do apologize", "we apologize", "apologies for", "please accept my"),
    *("please forgive", "i made a mistake", "i have made a mistake", "i've made a mistake", "i made an error"),
    *("my mistake", "i was mistaken", "i was wrong", "i misunderstood", "i misread"),
    *("let me correct", "i stand corrected"),
)
SELF_REFERENCE = (
    *("as an ai", "i am an ai", "i'm an ai", "an ai language model", "as a language model", "as a large language"),
    *("i am a language model", "i'm a language model", "i am a large language", "as an artificial intelligence"),
    *("as a text-based", "as a chatbot", "i am a chatbot", "i'm a chatbot", "as an assistant"),
    *("as a virtual assistant", "chatgpt", "openai", "minigpt", "my training data", "i was trained"),
    *("knowledge cutoff", "my knowledge", "i cannot see", "i can't see", "i can not see", "i am unable to"),
    *("i'm unable to", "i am not able to", "i'm not able to", "i do not have the ability", "i don't have the ability"),
    *("i do not have access", "i don't have access", "i do not have enough", "i don't have enough"),
    *("i cannot provide", "i can't provide", "i cannot determine", "i cannot assist", "i can't assist"),
    *("i can't help", "please provide more", "please provide the", "let me know if", "feel free to ask"),
    *("i hope this helps", "hope this helps", "is there anything else", "how can i help", "how may i assist"),
    *("can i help you", "would you like me to"),
)
LEFTOVERS = (
    *("###", "human:", "assistant:", "<img", "</img", "<imagehere", "<imagefeature", "<image>", "[inst]", "[/inst]"),
    *("<<sys>>", "<s>", "</s>", "<unk>", "<pad>", "<|", "|>", "[imgcontent]", "<imagecontent"),
    # The paper's prompts, of generation and of repair, sentence by sentence.
    *("describe this image in detail", "give as many details as possible", "say everything you see"),
    *("fix the error in the given", "remove any repeating sentences", "not english sentences, and so on"),
    *("remove unnecessary repetition", "rewrite any incomplete sentences"),
    *("return directly the", "without explanation"),
    # How language models begin and end what they were told to return without explanation.
    *("here is the corrected", "here's the corrected", "here is the revised", "here's the revised"),
    *("here is the paragraph", "here is the fixed", "here is the rewritten", "here is the edited"),
    *("corrected paragraph", "revised paragraph", "given paragraph", "input paragraph", "original paragraph"),
    *("paragraph is already", "is already correct", "no corrections are", "no errors in", "the corrected version"),
)
# Words that a sentence cannot end with.
DANGLING = (
    *("a", "an", "the", "and", "or", "but", "of", "with", "from", "into", "onto", "which", "whose", "because", "than"),
    *("their", "its", "his", "my", "your", "very", "is", "are", "was", "were", "has", "have", "be", "to", "at", "as"),
)
